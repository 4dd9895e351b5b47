"""Every remedy is followed as it is told, with all other options as given, on the whole plan: then it fits."""

from typing import Any

import pytest

from m2ray.planning.hardware import Cluster, Gpu, Node, parse_gpus
from m2ray.planning.plan import Plan
from m2ray.planning.remedies import Remedy
from m2ray.sizes import MaxMemory, parse_max_memory
from tests.unit.test_plan import PROMPTS, plan

GB = 10**9
_SAME_NAME = ("stages", "replicas", "compute_dtype", "batch_tokens", "compression", "weights", "offload", "device_map")


def follow(remedy: Remedy, gpus: str | Cluster, asked: dict[str, Any]) -> Plan:
    """The plan of somebody who reads the remedy's sentence and does what it says."""
    if remedy.option == "max_memory":
        return plan(gpus, **asked | {"max_memory": MaxMemory()})
    if remedy.option == "output":
        return plan(gpus, **asked | {"disk_free_bytes": None})
    if remedy.option == "layers":
        parts = plan(gpus, **asked).demand.options.parts
        return plan(gpus, **asked | {"parts": parts[-int(remedy.value) :]})
    if remedy.option == "gpus":
        number, name = remedy.text.removeprefix("It fits on ").split(" GPUs like ")
        changed = {"device_map": "auto"} if 'device_map = "auto"' in remedy.text else {}
        changed |= {"stages": int(remedy.text.split("stages = ")[1].split()[0].rstrip("."))} if "stages = " in remedy.text else {}
        total = int(number) * asked.get("replicas", 1)
        return plan(f"{total}x{name.split()[0].rstrip('.,')}", **asked | changed)
    assert remedy.option in _SAME_NAME, remedy
    return plan(gpus, **asked | {remedy.option: remedy.value})


@pytest.mark.parametrize(
    ("gpus", "asked", "offered"),
    [
        ("4xH200", {"device_map": "cuda:0"}, {"device_map": "auto", "gpus": 4, "offload": "cpu"}),
        ("1xH200", {"device_map": "cuda:0"}, {"gpus": 4, "offload": "cpu"}),
        ("2xH200", {}, {"weights": "packed", "gpus": 4, "offload": "cpu"}),
        ("1xH200", {"weights": "auto"}, {"gpus": 2, "offload": "cpu"}),
        ("8xA100-80GB", {"stages": 4}, {"stages": 7, "gpus": 7, "offload": "cpu"}),
        ("4xA100-80GB", {"stages": 4}, {"gpus": 7, "offload": "cpu"}),
        ("8xA100-80GB", {"replicas": 2}, {"replicas": 1, "gpus": 7, "offload": "cpu"}),
        ("4xA100-80GB", {"gpus_per_stage": 2}, {"gpus": 8, "offload": "cpu"}),
        ("8xA100-80GB", {"max_memory": parse_max_memory("0:60GB")}, {"max_memory": "none"}),
        ("8xH200", {"prompts": PROMPTS, "disk_free_bytes": 6 * GB}, {"compression": "planes", "layers": 48, "output": "elsewhere"}),
        ("1xH200", {"prompts": PROMPTS, "disk_free_bytes": 6 * GB}, {}),
    ],
    ids=str,
)
def test_what_is_told_is_enough(gpus: str, asked: dict[str, Any], offered: dict[str, Any]) -> None:
    asked = {"weights": "bf16", **asked}
    short = plan(gpus, **asked)
    assert not short.fits
    found = {remedy.option: remedy.value for remedy in short.remedies}
    assert found.items() >= offered.items()
    if not offered:
        assert found == {}, "the GPUs alone, or the disk alone, would not do"
    for remedy in short.remedies:
        if "may be used" not in remedy.text:
            assert follow(remedy, gpus, asked).fits, remedy


def test_more_gpus_are_those_of_nodes_that_have_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host too small for its stage stays too small, however many there are."""
    (gpu,) = parse_gpus("H200").nodes[0].gpus

    def on(host_bytes: int) -> list[str]:
        return [remedy.option for remedy in plan(Cluster((Node("a", (Gpu(**vars(gpu)),), host_bytes=host_bytes),))).remedies]

    assert "gpus" in on(64 * GB)
    assert "gpus" not in on(2 * GB)
