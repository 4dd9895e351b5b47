"""Weights and configurations that change while a run goes on: no row of another model gets in."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import m2ray
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import HOLDER, assert_equals_transformers, commits, minimax, prompts, wait_for_commits, words  # noqa: F401 - fixtures among them
from tests.ray.test_faults import stage_processes
from tests.reference import MINIMAX_TINY, other_weights

REFUSED = r"Error: The weights that the stages have loaded are not those of the run at \S+: "


@pytest.mark.timeout(600)
def test_replaced_weights_are_refused_by_layer_at_a_restart_and_at_a_resume(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, run = shutil.copytree(minimax, tmp_path / "model"), tmp_path / "run"
    shards, slowly = ("--shard-tokens", "250"), ("--in-flight", "1KB")
    driver = cluster.start("m2ray", "extract", *words(model, prompts, run, "--stages", "3", *shards, *slowly))
    wait_for_commits(run, 1, driver)
    record = (run / "weights.json").read_bytes()
    with other_weights(model):
        os.kill(sorted(stage_processes(cluster))[1], signal.SIGKILL)
        printed, _ = driver.communicate(timeout=180)
        assert driver.returncode == 1, printed
        assert re.search(REFUSED + "(the embedding and layers 0-1|layers 2-3|layers 4-6) of 7 layers differ", printed), printed
        before = commits(run)
        again = cluster.run("m2ray", "extract", *words(model, prompts, run, "--stages", "1", *shards))
        assert again.returncode == 1, again.stdout
        assert re.search(REFUSED + "the embedding and layers 0-6 of 7 layers differ", again.stderr), again.stderr
        assert "Put the files back" in again.stderr
        assert "Traceback" not in printed + again.stderr
        assert commits(run) == before
        assert not (run / "_SUCCESS").exists()
    done = cluster.run("m2ray", "extract", *words(model, prompts, run, "--stages", "1", *shards))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "weights.json").read_bytes() == record
    assert m2ray.open_run(run).is_complete
    assert_equals_transformers(run, model, range(MINIMAX_TINY["layers"]))


def test_a_configuration_edited_between_the_claim_and_the_loading_is_refused(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, run = shutil.copytree(minimax, tmp_path / "model"), tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=dict(cluster.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert "held" in holder.stdout.readline()
        driver = cluster.start("m2ray", "extract", *words(model, prompts, run, "--stages", "2", "--placement-timeout-s", "120"))
        deadline = time.monotonic() + 120
        while not (run / "job.json").exists():
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)  # looks again; nothing rests on the interval
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2 * config["rms_norm_eps"]}))
    finally:
        holder.communicate("\n", timeout=60)
    printed, _ = driver.communicate(timeout=180)
    assert driver.returncode == 1, printed
    assert re.search(r"Error: \S+ on node \S+ is not the checkpoint that the run began with: config\.json", printed), printed
    assert "Traceback" not in printed
    assert not (run / "weights.json").exists()
    assert not commits(run)
