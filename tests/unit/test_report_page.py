"""`m2ray report`: one page without network, whole for those who hear it, with whatever a run's rows are called."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import count
from pathlib import Path
from xml.etree import ElementTree as ET

import html5lib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from m2ray.activations.reading.reader import open_run
from m2ray.activations.writing import commits
from m2ray.batches import Bits, Column, PartSpec
from m2ray.chain.report import build_report
from m2ray.cli import main
from m2ray.errors import MissingPackageError, NotInRunError, RunDamagedError
from m2ray.report.building import build_page
from m2ray.report.drawing import require_matplotlib
from m2ray.report.sample import Sampled, spread
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs
from tests.unit.test_report import plan, run  # noqa: F401 - fixtures
from tests.unit.test_statistics_of_runs import finished

NUM_LAYERS, NUM_EXPERTS, NUM_TOKENS = 62, 256, 70
EXPERTS = (Column("expert_ids", "int16", 2), Column("expert_weights", "float32", 2))
PARTS = (
    *(PartSpec.of("residual", layer, "bfloat16", runs.WIDTH) for layer in range(NUM_LAYERS)),
    *(PartSpec("router_topk", layer, EXPERTS) for layer in range(NUM_LAYERS)),
)
HOSTILE = "</title></svg><script>alert(1)</script>\"' onload=x $\\frac{ \u202e\x00 \ud800".encode("utf-8", "replace").decode()
XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def bits(part: PartSpec, sequence_id: int) -> Bits:
    """Rows of a norm that grows by layer, a channel that stands out from layer 30 on, and an expert that is chosen always."""
    rng = np.random.default_rng([part.layer, sequence_id])
    if part.site == "router_topk":
        ids = np.stack([rng.integers(0, NUM_EXPERTS - 1, NUM_TOKENS), np.full(NUM_TOKENS, NUM_EXPERTS - 1)], axis=1).astype(np.int16)
        return np.concatenate([ids.view(np.uint8), np.full(ids.shape, 0.5, np.float32).view(np.uint8)], axis=1)
    rows = torch.from_numpy(rng.standard_normal((NUM_TOKENS, runs.WIDTH), dtype=np.float32)) * (1 + part.layer)
    rows[0] *= 50
    rows[:, 7] *= 100 if part.layer >= 30 else 1
    return rows.bfloat16().view(torch.uint8).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 62 layers and 256 experts, of hostile names."""
    folder = tmp_path_factory.mktemp("report") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "bits", bits)
        patch.setattr(runs, "NUM_LAYERS", NUM_LAYERS)
        patch.setattr(runs, "LOADED", {None: "e" * 32, **{layer: f"{layer:032x}" for layer in range(NUM_LAYERS)}})
        patch.setattr(runs, "token_count", lambda sequence_id: NUM_TOKENS)
        patch.setattr(runs, "row_id", lambda sequence_id: f"{HOSTILE} {sequence_id}")
        clock = count()
        patch.setattr(commits, "utc_now", lambda: f"2026-01-01T00:{next(clock):02d}:00+00:00")
        patch.setattr(runs, "QUARANTINED", {2: HOSTILE, 6: "empty"})
        runs.finished_run(LocalStore(folder), PARTS)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, request: pytest.FixtureRequest) -> str:
    told = build_report(request.getfixturevalue("plan"), "run", _run(request))
    (folder / "report.json").write_text(json.dumps(told))
    return build_page(LocalStore(folder), open_run(folder), words=_words, head=_head)


def _run(request: pytest.FixtureRequest):
    from tests.unit.test_report import run as of

    return of.__wrapped__(request.getfixturevalue("plan"))


def _words(ids: list[int]) -> list[str]:
    return [f" 词{each}\n\x00\ud800<b>{HOSTILE}" for each in ids]


def _head(rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(len(rows_NH)), torch.linspace(0, 1, len(rows_NH))


@cache
def parsed(page: str) -> ET.Element:
    """Parsed as browsers do; any error in it is one here."""
    return html5lib.HTMLParser(strict=True).parse(page)


def words_of(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_it_is_small_and_asks_the_network_for_nothing(page: str) -> None:
    assert len(page.encode()) < 2_000_000
    tree = parsed(page)
    assert not list(tree.iter(f"{XHTML}script"))
    for each in tree.iter():
        for name, value in each.attrib.items():
            if name.rpartition("}")[2] in {"href", "src", "action", "data", "srcset", "poster"}:
                assert value.startswith(("#", "data:")), value[:80]
            assert not name.lower().startswith("on"), name
    assert not re.search(r"url\((?!#)|@import", page)


def test_hostile_names_are_text(page: str) -> None:
    tree = parsed(page)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    assert sum(shown in (each.text or "") for each in tree.iter(f"{XHTML}th")) >= 2
    assert "\u202e" not in page
    assert "\x00" not in page
    assert "<script" not in page
    assert "<b>" not in page


def test_every_figure_can_be_heard_and_every_link_leads_somewhere(page: str) -> None:
    tree = parsed(page)
    ids = [each.attrib["id"] for each in tree.iter() if "id" in each.attrib]
    assert len(ids) == len(set(ids))
    figures = list(tree.iter(f"{XHTML}figure"))
    assert len(figures) == 6
    for each in figures:
        (svg,) = each.iter(f"{SVG}svg")
        assert svg.attrib["role"] == "img"
        title, description = svg.attrib["aria-labelledby"].split()
        named = {inner.attrib.get("id"): words_of(inner) for inner in svg}
        assert named[title]
        assert named[description]
        (table,) = each.iter(f"{XHTML}table")
        rows = list(table.iter(f"{XHTML}tr"))
        assert len(rows) > 1
        width = len(list(rows[0]))
        assert all(len(list(row)) == width for row in rows)
    for table in tree.iter(f"{XHTML}table"):
        assert words_of(next(table.iter(f"{XHTML}caption")))
        assert {head.attrib["scope"] for head in table.iter(f"{XHTML}th")} <= {"row", "col"}
    for link in tree.iter(f"{XHTML}a"):
        assert link.attrib["href"].removeprefix("#") in ids
    references = {value[1:] for each in tree.iter() for name, value in each.attrib.items() if name.endswith("href") and value[:1] == "#"}
    assert references | set(re.findall(r"url\(#([\w-]+)\)", page)) <= set(ids)


def section(page: str, name: str) -> str:
    return next(words_of(each) for each in parsed(page).iter(f"{XHTML}section") if each.attrib["id"] == name)


def test_it_says_what_the_run_is(page: str) -> None:
    assert "12 = 10 ready + 2 quarantined" in section(page, "asked")
    assert "residual 0-61; router_topk 0-61" in section(page, "asked")
    assert "10.0%" in section(page, "measured"), "padding of report.json"
    assert "3 shards were committed, the last one 2.0 minutes after the first." in section(page, "timeline")
    assert "stage 0.0 computed longest, 6.0 s" in section(page, "timeline")
    assert "stage 0.1 GPU 1: 24.0 GB of" in section(page, "memory")
    assert "2 of 12 rows of the prompts (16.7%)" in section(page, "quarantine")
    norms = section(page, "norms")
    assert re.search(r"largest at layer 61, .*There a first token's row is \d\d\.\d times", norms)
    assert "The most frequent: 7 in 32 of 62 layers." in norms
    assert "0: ␣词" in section(page, "prompt")
    assert "The first 64 of its 70 rows are shown." in section(page, "prompt")
    assert "expert 255 of layer" in section(page, "experts")
    assert "128.0 times an even load" in section(page, "experts")
    assert section(page, "lens").count("Prompt") == 5


def test_a_prompt_is_chosen_by_its_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    runs.finished_run(store)
    page = build_page(store, open_run(store.url), row_id="row-8")
    assert "the prompt row-8" in section(page, "prompt")
    assert f"0: {runs.token_ids(8)[0]}" in section(page, "prompt"), "by ids, without a tokenizer"
    assert "Give it by --model" in section(page, "prompt")
    with pytest.raises(NotInRunError, match="has the row id 'nobody'"):
        build_page(store, open_run(store.url), row_id="nobody")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    runs.claim_run(store, runs.job(store))
    page = build_page(store, open_run(store.url))
    assert "has no report.json yet" in section(page, "measured")
    assert "No shard is committed" in section(page, "timeline")
    assert "Neither rows are committed nor statistics" in section(page, "norms")


def test_a_run_of_statistics_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    finished(store, "statistics")
    page = build_page(store, open_run(store.url))
    assert "Of all rows, from the run's statistics" in section(page, "norms")
    assert "Of all rows, from the run's statistics" in section(page, "experts")
    assert "No rows are committed" in section(page, "prompt")


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    runs.claim_run(store, runs.job(store))
    for damaged in ("{", "[]", '{"tokens": 1}', '{"tokens": "1", "extract_s": {}, "stages": [{}]}'):
        (tmp_path / "run/report.json").write_text(damaged)
        with pytest.raises(RunDamagedError, match=r"report\.json is not what m2ray writes"):
            build_page(store, open_run(store.url))


def test_the_command_writes_it_into_the_run_or_where_it_is_told(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    runs.finished_run(store)
    done = CliRunner().invoke(main, ["report", store.url])
    assert done.exit_code == 0, done.output
    assert "Tokens are shown by their ids: " in done.output
    assert (tmp_path / "run/report.html").read_text().startswith("<!DOCTYPE html>")
    elsewhere = tmp_path / "page.html"
    assert CliRunner().invoke(main, ["report", store.url, "--output", str(elsewhere), "--prompt", "row-3"]).exit_code == 0
    assert "the prompt row-3" in elsewhere.read_text()
    wrong = CliRunner().invoke(main, ["report", store.url, "--prompt", "row3"])
    assert wrong.exit_code == 1
    assert "Did you mean 'row-3'?" in " ".join(wrong.output.split())


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'm2ray\[report\]'"):
        require_matplotlib()


def test_the_sample_is_bounded() -> None:
    some = [Sampled(number, str(number), 100) for number in range(1000)]
    assert [each.sequence_id for each in spread(some, 4)] == [125, 375, 625, 875]
    assert len(spread(some, 8, 250)) == 2
    assert spread([Sampled(0, "a", 9000), Sampled(1, "b", 5000)]) == [Sampled(1, "b", 5000)]


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome is installed")
    return [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]


def test_a_browser_shows_it_light_dark_and_narrow(page: str, browser: list[str], tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    brightness = []
    for scheme in (1, 0):
        shot = tmp_path / f"{scheme}.png"
        words = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,4000", f"--screenshot={shot}", file.as_uri())
        assert "CONSOLE" not in told(browser, *words).stderr
        brightness.append(np.asarray(Image.open(shot).convert("L")).mean())
    assert brightness[0] > 180
    assert brightness[1] < 100
    frame = tmp_path / "frame.html"
    script = "document.title = [...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth).join()"
    frame.write_text(f'<iframe src="page.html" width="400" height="800" style="border:0" onload="{script}"></iframe>')
    dumped = told(browser, "--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    assert "<title>400</title>" in dumped.stdout or "<title>385</title>" in dumped.stdout, "nothing is wider than 400 pixels"


def told(browser: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*browser, *words], capture_output=True, text=True, timeout=100, check=True, env={**os.environ, "HOME": "/tmp"})
