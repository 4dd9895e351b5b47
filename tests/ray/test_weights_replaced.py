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

import m2ray
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import HOLDER, assert_equals_transformers, commits, prompts, qwen3, wait_for_commits, words  # noqa: F401 - fixtures among them
from tests.ray.test_faults import stage_processes
from tests.reference import other_weights

REFUSED = r"Error: The weights that the stages have loaded are not those of the run at \S+: the embedding and layers 0-4 of 5 layers differ"


def test_replaced_weights_are_refused_at_a_restart_and_at_a_resume(
    cluster: RayCluster,
    qwen3: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, run = shutil.copytree(qwen3, tmp_path / "model"), tmp_path / "run"
    command = ("m2ray", "extract", *words(model, prompts, run, "--stages", "1", "--shard-tokens", "60", "--in-flight", "1KB"))
    driver = cluster.start(*command)
    while not (stages := stage_processes(cluster)):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)  # polls; a driver that hangs is the test's time limit
    wait_for_commits(run, 1, driver)
    (stage,) = stages
    os.kill(stage, signal.SIGSTOP)  # the run could complete before the weights are replaced
    record = (run / "weights.json").read_bytes()
    with other_weights(model):
        os.kill(stage, signal.SIGKILL)
        printed, _ = driver.communicate(timeout=180)
        assert driver.returncode == 1, printed
        assert re.search(REFUSED, printed), printed
        before = commits(run)
        again = cluster.run(*command)
        assert again.returncode == 1, again.stdout
        assert re.search(REFUSED, again.stderr), again.stderr
        assert "Put the files back" in again.stderr
        assert "Traceback" not in printed + again.stderr
        assert commits(run) == before
        assert not (run / "_SUCCESS").exists()
    done = cluster.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "weights.json").read_bytes() == record
    assert m2ray.open_run(run).is_complete
    assert_equals_transformers(run, model, range(5))


def test_a_configuration_edited_between_the_claim_and_the_loading_is_refused(
    cluster: RayCluster,
    qwen3: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, run = shutil.copytree(qwen3, tmp_path / "model"), tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=dict(cluster.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert "held" in holder.stdout.readline()
        driver = cluster.start("m2ray", "extract", *words(model, prompts, run, "--stages", "1", "--placement-timeout-s", "120"))
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
