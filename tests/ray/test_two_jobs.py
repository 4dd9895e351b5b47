"""What is loaded is one thing, what a job takes of it another."""

import json
import shutil
import sys
from pathlib import Path

from tests.ray.conftest import RayCluster
from tests.ray.test_extract import assert_equals_transformers, minimax, prompts  # noqa: F401 - fixtures among them
from tests.reference import MINIMAX_TINY

SCRIPT = str(Path(__file__).with_name("two_jobs.py"))


def test_a_chain_does_one_job_after_another_in_waves(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    """Into two folders, of other layers and micro-batches; the weights are read once: while the second is done others lie there."""
    model = tmp_path / "model"
    shutil.copytree(minimax, model)
    runs = (tmp_path / "first", tmp_path / "second")
    done = cluster.run(sys.executable, SCRIPT, str(model), str(prompts), str(runs[0]), "all", str(runs[1]), "0,3,5", PYTHONPATH=".")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equals_transformers(runs[0], minimax, range(MINIMAX_TINY["layers"]))
    assert_equals_transformers(runs[1], minimax, (0, 3, 5))
    refused, first, second = json.loads(done.stdout.splitlines()[-1])
    assert refused == ["StoreError", 0], "the folder is looked at before the weights are read"
    assert [(stage["pid"], stage["read_bytes"]) for stage in first] == [(stage["pid"], stage["read_bytes"]) for stage in second]
    assert first[0]["tokens"] < second[0]["tokens"] == second[1]["tokens"], "the first stage was killed, and counts from there on"
    assert second[1]["tokens"] <= first[1]["tokens"], "the second one was not"
    assert second[1]["written_bytes"] < first[1]["written_bytes"]
