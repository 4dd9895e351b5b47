"""Several chains over one prompt set: where they are placed, that they share the work, and that one that is lost gives it back."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.ray.conftest import RayCluster, environment
from tests.ray.test_extract import minimax, prompts, wait_for_commits, words  # noqa: F401 - fixtures among them
from tests.ray.test_faults import OPTIONS, assert_same_run, stage_processes, undisturbed  # noqa: F401

PLACEMENT = """
import json, ray
from ray.cluster_utils import Cluster
from m2ray.chain.placement import reserve, size
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 8})
for _ in range(2):
    nodes.add_node(num_cpus=8, num_gpus=8)
ray.init(address=nodes.address, logging_level="ERROR")
with reserve(12, size(), 60.0, num_replicas=2) as held:
    print(json.dumps([[reservation.nodes()[bundle] for bundle in reservation.bundles] for reservation in held]))
ray.shutdown()
nodes.shutdown()
"""


def test_two_replicas_of_12_stages_on_three_nodes_of_8_gpus() -> None:
    done = subprocess.run([sys.executable, "-c", PLACEMENT], env=environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    replicas = json.loads(done.stdout.splitlines()[-1])
    assert [len(nodes) for nodes in replicas] == [12, 12]
    for nodes in replicas:
        crossings = sum(one != next_one for one, next_one in pairwise(nodes))
        assert crossings == 1, "12 stages need two nodes of 8, and neighbours share one"
    assert max(sum(nodes.count(node) for nodes in replicas) for node in {*replicas[0], *replicas[1]}) <= 8


def test_replicas_share_one_queue_and_one_that_loses_a_stage_gives_its_shards_back(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    driver = cluster.start("m2ray", "extract", *words(minimax, prompts, run, "--stages", "1", "--replicas", "2", *OPTIONS))
    wait_for_commits(run, 1, driver)
    processes = stage_processes(cluster)
    assert len(processes) == 2
    os.kill(min(processes), signal.SIGKILL)
    printed, _ = driver.communicate(timeout=150)
    assert driver.returncode == 0, printed
    assert "in each of 2 replicas" in printed
    assert_same_run(run, undisturbed)
