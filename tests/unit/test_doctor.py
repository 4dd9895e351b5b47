"""The doctor: facts that break each check, facts that break none, and this machine with sound and damaged folders."""

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from m2ray.cli import main
from m2ray.doctor.checks import check_nodes
from m2ray.doctor.node_facts import GpuUser, NodeFacts
from m2ray.planning.hardware import Gpu, Node
from tests.reference import make_minimax

GIB = 2**30
VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "m2ray": "0.2.0", "driver": "580.1", "cuda": "13.0", "nccl": "2.28"}


def sound(name: str = "a", **hardware) -> NodeFacts:
    gpus = tuple(Gpu(index, "NVIDIA H200", 140 * GIB, 139 * GIB) for index in range(2))
    node = Node(name, **{"gpus": gpus, "shm_bytes": 64 * GIB, "versions": VERSIONS, **hardware})
    return NodeFacts(
        node,
        source_digest="d",
        torch_cuda="13.0",
        torch_sees_gpus=True,
        torch_kernels=("sm_80", "sm_90"),
        driver_cuda="13.0",
        compute_capabilities=((9, 0), (9, 0)),
        interfaces=("lo", "eth0"),
        temp_bytes=100 * GIB,
        temp_free_bytes=50 * GIB,
        read_bytes_per_s=2e9,
    )


def problems(*nodes: NodeFacts, model_bytes: int = 230 * 10**9) -> list[tuple[str, str, str]]:
    found = [finding for finding in check_nodes(nodes, 4 * GIB, model_bytes) if finding.level == "problem"]
    assert all(finding.remedy for finding in found), "each problem has its remedy"
    return [(finding.check, finding.where, finding.what) for finding in found]


def test_sound_nodes_have_no_problem() -> None:
    assert problems(sound("a"), sound("b")) == []


BROKEN = {
    "torch cannot be imported": ("torch", {"torch_error": "libcudart.so.13: no such file"}),
    "without CUDA": ("torch", {"torch_cuda": None, "torch_sees_gpus": False}),
    "runs CUDA up to 12.8": ("torch", {"driver_cuda": "12.8"}),
    "cannot use any": ("torch", {"torch_sees_gpus": False}),
    "no kernels for GPU 0": ("torch", {"compute_capabilities": ((10, 0),)}),
    "process 4711": ("gpu_busy", {"gpu_users": (GpuUser(1, 4711, None),)}),
    "no gcc and no clang": ("triton", {"triton_problem": "there is no C compiler: no gcc and no clang"}),
    "no config.json": ("model_visible", {"model_problem": "There is no config.json in /m."}),
    "another folder": ("store", {"output_problem": "/out is another folder here."}),
    "temporary folder": ("temp_space", {"temp_free_bytes": 4 * GIB}),
    "min through this node": ("read_speed", {"read_bytes_per_s": 50e6}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_check_finds_what_breaks_it(what: str) -> None:
    check, change = BROKEN[what]
    found = problems(replace(sound(), **change))
    assert [(one[0], one[1]) for one in found] == [(check, "a")]
    assert what in found[0][2]


def test_memory_taken_by_nobody_that_can_be_seen_and_small_shared_memory() -> None:
    taken = sound(gpus=(Gpu(0, "NVIDIA H200", 140 * GIB, 100 * GIB),), shm_bytes=64 << 20)
    assert [check for check, _, _ in problems(taken)] == ["gpu_busy", "shared_memory"]


@pytest.mark.parametrize("name", ["python", "ray", "torch", "m2ray", "driver"])
def test_versions_that_differ_are_named_with_their_nodes(name: str) -> None:
    other = sound("b", versions={**VERSIONS, name: "0.0"})
    ((check, where, what),) = problems(sound("a"), other)
    assert (check, where) == ("same_everywhere", "cluster")
    assert f"a has {VERSIONS[name]}, b has 0.0" in what


def test_a_node_without_gpus_needs_no_driver() -> None:
    cpu = replace(sound("head", gpus=(), versions={name: VERSIONS[name] for name in ("python", "ray", "torch", "m2ray")}), torch_cuda=None)
    assert problems(sound("a"), cpu) == []


def test_code_that_differs() -> None:
    assert [what.split(" is ")[0] for _, _, what in problems(sound("a"), replace(sound("b"), source_digest="e"))] == ["m2ray's code"]


NCCL = {"NCCL_P2P_DISABLE": "1", "NCCL_SOCKET_IFNAME": "ib"}, {"NCCL_SOCKET_IFNAME": "^lo,eth"}, {"NCCL_SOCKET_IFNAME": "=eth"}


@pytest.mark.parametrize("env", NCCL)
def test_what_concerns_nccl_is_noted_and_no_problem(env: dict[str, str]) -> None:
    """The chain uses none of it."""
    other = sound("b", versions={**VERSIONS, "nccl": "0.0"})
    nodes = [replace(sound("a"), nccl_env=env), replace(other, nccl_env=env | {"NCCL_DEBUG": "WARN"})]
    assert problems(*nodes) == []
    noted = [finding.what for finding in check_nodes(nodes, 4 * GIB) if finding.level == "note"]
    for name, value in env.items():
        assert sum(f"{name}={value}" in what for what in noted) == 2, "of each node"
    assert [what for what in noted if " is not the same " in what] == [
        "nccl is not the same on every node: a has 2.28, b has 0.0.",
        "NCCL_DEBUG is not the same on every node: a has unset, b has WARN.",
    ]


def test_no_nccl_at_all_is_noted_and_the_command_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    without = sound(versions={name: VERSIONS[name] for name in VERSIONS if name != "nccl"})
    assert [finding.what for finding in check_nodes([without], 4 * GIB) if finding.check == "nccl"] == ["torch has no NCCL."]
    before, _ = doctor()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nope")
    after, found = doctor()
    assert (after, [one["level"] for one in found["findings"] if one["check"] == "nccl"]) == (before, ["note"])


def test_all_problems_come_at_once() -> None:
    bad = replace(sound(), torch_sees_gpus=False, temp_free_bytes=0, model_problem="none", output_problem="none")
    assert {check for check, _, _ in problems(bad)} == {"torch", "temp_space", "model_visible", "store"}


def doctor(*words: str) -> tuple[int, dict]:
    result = CliRunner().invoke(main, ["doctor", "--in-flight", "1MB", "--json", *words], env={"RAY_ADDRESS": ""})
    return result.exit_code, json.loads(result.stdout)


def test_this_machine_with_a_sound_and_a_damaged_model(tmp_path: Path) -> None:
    model, output = make_minimax(tmp_path / "model", "fp8"), tmp_path / "runs" / "run"
    _, found = doctor("--model", str(model), "--output", str(output))
    of_folders = {"checkpoint_files", "checkpoint_tensors", "store", "model_visible", "read_speed"}
    assert not [one for one in found["findings"] if one["level"] == "problem" and one["check"] in of_folders]
    (told,) = [one["what"] for one in found["findings"] if one["check"] == "checkpoint_tensors"]
    assert re.search(r", [\d,]+ of these FP8 in blocks of 128 x 128, in bfloat16 [\d,]+; a tiny copy", told), told
    assert found["nodes"][0]["read_bytes_per_s"] > 0
    assert not output.parent.exists(), "what was made to try the store is gone"
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("ours", encoding="utf-8")
    doctor("--output", str(output))
    assert [path.name for path in output.iterdir()] == ["notes.txt"], "and nothing else"
    index = model / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["metadata"]["total_size"] += 5
    index.write_text(json.dumps(record))
    _, found = doctor("--model", str(model))
    (note,) = [one for one in found["findings"] if one["check"] == "checkpoint_files"]
    assert (note["level"], f"{record['metadata']['total_size']:,} bytes" in note["what"]) == ("note", True)
    cut = min(model.glob("*.safetensors"))
    os.truncate(cut, cut.stat().st_size - 10)
    exit_code, found = doctor("--model", str(model), "--output", "/sys/m2ray-run")
    broken = {one["check"]: one["what"] for one in found["findings"] if one["level"] == "problem"}
    assert exit_code == 1
    assert {"checkpoint_files", "store"} <= broken.keys()
    assert cut.name in broken["checkpoint_files"]


def test_the_compiler_is_looked_for_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    _, found = doctor()
    assert "no-such-compiler" in found["nodes"][0]["triton_problem"]


def test_a_cluster_that_cannot_be_joined_hides_no_other_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    exit_code, found = doctor("--address", address, "--model", str(tmp_path))
    problems = {one["check"]: one for one in found["findings"] if one["level"] == "problem"}
    assert (exit_code, found["nodes"]) == (1, [])
    assert problems.keys() == {"checkpoint_files", "cluster"}
    assert address in problems["cluster"]["what"]
    assert all(one["remedy"] for one in problems.values())


def test_what_is_printed_ends_with_the_problems_and_their_number(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--model", str(tmp_path), "--in-flight", "1000TB"], env={"RAY_ADDRESS": ""})
    lines = [line for line in result.stdout.splitlines() if line.startswith(("note", "problem"))]
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert result.stdout.splitlines()[-1] == f"{sum(line.startswith('problem') for line in lines)} problems."
