"""`m2ray plan` and `m2ray doctor` on a cluster of two nodes, as a user starts them."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import START_TIMEOUT_S, RayCluster, end_node, free_ports, ray_head
from tests.reference import make_minimax


@contextmanager
def second_node(head: RayCluster) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with a label and an NCCL variable of its own."""
    (agent_port,) = free_ports(1)
    words = ["ray", "start", "--block", f"--address={head.env['RAY_ADDRESS']}", "--num-cpus=1", "--num-gpus=0", "--labels=kind=b"]
    words += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"]
    env = {**head.env, "NCCL_DEBUG": "WARN"}
    worker = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield worker
    finally:
        end_node(worker)


def has_joined(head: RayCluster, worker: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while worker.poll() is None and time.monotonic() < deadline:
        if head.run("ray", "status").stdout.count(" node_") >= 2:
            return True
    return False


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    with ray_head(num_cpus=2) as head:
        for _ in range(3):  # a port that was free may be another process's by the time Ray wants it
            with second_node(head) as worker:
                if has_joined(head, worker):
                    yield head
                    return
        pytest.fail("the second node did not start")


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
