"""A cluster of two nodes, as a user starts it: `m2ray plan`, `m2ray doctor`, and a job with a stage on each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import RayCluster
from tests.ray.struck_waves import assert_struck_in_waves_gives_the_rows_of_ready_layers, two_node_cluster
from tests.ray.test_extract import prompts  # noqa: F401 - a fixture
from tests.reference import make_minimax


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    with two_node_cluster() as head:
        yield head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("minimax") / "model", "fp8")


def plan_json(cluster: RayCluster, model: Path, *words: str) -> dict[str, Any]:
    done = cluster.run("m2ray", "plan", "--model", str(model), "--json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_connected_cluster_is_planned(two_nodes: RayCluster, model: Path) -> None:
    found = plan_json(two_nodes, model, "--stages", "3", "--batch-tokens", "512")
    assert len(found["cluster"]) == 2
    assert all(
        node["host_bytes"] and node["shm_bytes"] and node["disk_free_bytes"] and node["versions"]["ray"] for node in found["cluster"]
    )
    assert len({stage["node"] for stage in found["stages"]}) == 2
    assert len(plan_json(two_nodes, model, "--node-labels", "kind=b", "--batch-tokens", "512")["cluster"]) == 1
    refused = two_nodes.run("m2ray", "plan", "--model", str(model), "--node-labels", "kind=none")
    assert refused.returncode == 1
    assert "kind=none" in refused.stderr


def test_the_doctor_looks_at_every_node(two_nodes: RayCluster, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["--address", two_nodes.env["RAY_ADDRESS"], "--model", str(model), "--output", str(output), "--in-flight", "1MB", "--json"]
    done = two_nodes.run("m2ray", "doctor", *words)
    found = json.loads(done.stdout)
    assert len(found["nodes"]) == 2
    assert all(node["read_bytes_per_s"] for node in found["nodes"])
    (differs,) = [one for one in found["findings"] if one["check"] == "same_everywhere"]
    assert "NCCL_DEBUG" in differs["what"]
    assert "unset" in differs["what"]
    assert differs["level"] == "note", "the chain uses no NCCL"
    assert (done.returncode, found["ok"]) == (0, True)
    of_folders = {"checkpoint_files", "checkpoint_tensors", "model_visible", "store"}
    assert not [one for one in found["findings"] if one["level"] == "problem" and one["check"] in of_folders]
    assert not [path for path in output.rglob("*") if path.is_file()], "what was made to try the store is gone"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_packed_and_a_streamed_stage_struck_in_the_middle_of_a_wave(
    two_nodes: RayCluster,
    model: Path,
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """By `ray job submit`: a stage is killed, and then the job is stopped and submitted again."""
    options = "--id-column id --compute-dtype float32 --store-dtype float32 --batch-tokens 256 --shard-tokens 150 --threads-per-stage 1"
    words = ["--model", str(model), "--prompts", str(prompts), *options.split()]
    printed = assert_struck_in_waves_gives_the_rows_of_ready_layers(two_nodes, words, 256, tmp_path)
    assert "layers 0-2, layers 0-2 packed, waves of 512 tokens" in printed
    assert "layers 3-6, layers 3-6 in files, waves of 512 tokens" in printed
