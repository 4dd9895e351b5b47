"""Every JSON key that scripts may rely on is in docs/planning.md, and what that names is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from m2ray.chain.report import build_report
from m2ray.cli import main
from m2ray.planning.report import to_json
from tests.unit.test_plan import PROMPTS
from tests.unit.test_plan import plan as m2_plan
from tests.unit.test_report import plan, run  # noqa: F401 - fixtures

DOCS = (Path(__file__).parents[2] / "docs/planning.md").read_text(encoding="utf-8")
FREE_NAMES = ("running", "loading", "versions", "limits", "nccl_env")
"""Their keys are items, packages, resources or variables: not of the format."""


def section(title: str) -> str:
    return DOCS.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def words(text: str) -> set[str]:
    """The names in backticks."""
    return {name for quoted in re.findall(r"`([^`]+)`", text) for name in re.findall(r"[a-z_]+", quoted)}


def first_column(text: str) -> set[str]:
    return {name for line in text.splitlines() if line.startswith("| `") for name in words(line.split("|")[1])}


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from keys(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            if name not in FREE_NAMES:
                yield from keys(each)


def assert_documented(found: Any, text: str) -> None:
    assert set(keys(found)) - words(text) == set(), "keys without a word in the docs"
    assert first_column(text) - set(keys(found)) == set(), "keys in the docs that are not there"


def test_the_keys_of_the_plan() -> None:
    told = to_json(m2_plan("2 nodes of 4xH200", prompts=PROMPTS, price_per_gb_month=0.02))
    short = to_json(m2_plan("1xH200", prompts=PROMPTS))
    assert short["shortages"]
    assert short["remedies"]
    assert_documented([told, short, {"checkpoint": {"source": "config", "index_bytes": None}}], section("JSON"))
    items = words(section("What a GPU holds") + section("What a host holds"))
    for each in (told, to_json(m2_plan("2xH200", offload=True))):
        for memory in (*each["gpus"], *(stage["host"] for stage in each["stages"])):
            assert {*memory["running"], *memory["loading"]} <= items
    assert set(told["rates"]["limits"]) <= words(section("JSON"))


@pytest.mark.usefixtures("plan", "run")
def test_the_keys_of_the_report(request: pytest.FixtureRequest) -> None:
    text = section("report.json")
    report = build_report(request.getfixturevalue("plan"), "run", request.getfixturevalue("run"))
    assert set(keys(report)) - words(text) == set()
    assert first_column(text) - set(keys(report)) == set()


def test_the_keys_of_the_doctor() -> None:
    result = CliRunner().invoke(main, ["doctor", "--in-flight", "1TB", "--json"], env={"RAY_ADDRESS": ""})
    found = json.loads(result.stdout)
    assert found["findings"]
    text = section("m2ray doctor")
    assert set(keys(found)) - words(text + section("JSON")) == set(), "hardware is as in the plan's cluster"
