"""Stages on several devices, and devices that are too small for a micro-batch: the real job, devices made up on the CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.ray.conftest import RayCluster
from tests.ray.test_extract import (  # noqa: F401 - fixtures among them
    MINIMAX_TINY,
    assert_equals_transformers,
    minimax,
    prompts,
    wait_for_commits,
    words,
)
from tests.ray.test_faults import stage_processes

SCRIPT = str(Path(__file__).with_name("extract_on_odd_devices.py"))


def extract(cluster: RayCluster, fitting_tokens: int, kind: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    return cluster.run(sys.executable, SCRIPT, str(fitting_tokens), kind, *flags, PYTHONPATH=".")


def shapes(run: Path) -> list[tuple[int, int]]:
    """(sequences, padded length) of every micro-batch, as the commits say."""
    commits = [json.loads(path.read_text()) for path in sorted((run / "_commits").iterdir())]
    return [(count, length) for commit in commits for count, length in commit["micro_batches"]]


def test_a_stage_of_two_devices_equals_transformers(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    done = extract(cluster, 10**9, "2", words(minimax, prompts, run, "--stages", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equals_transformers(run, minimax, range(MINIMAX_TINY["layers"]))
    report = json.loads((run / "report.json").read_text())
    assert [stage["parameter_bytes"] > 0 for stage in report["stages"]] == [True, True]
    assert report["parameter_bytes"]["planned"] == report["parameter_bytes"]["measured"]


def test_layers_in_host_memory_and_on_disk_equal_transformers(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    """In waves, and a stage is killed meanwhile: the one that takes its place makes copies of its own."""
    run, folder = tmp_path / "run", tmp_path / "offload"
    flags = words(minimax, prompts, run, "--stages", "2", "--shard-tokens", "150", "--offload", "disk", "--offload-folder", str(folder))
    flags += ["--in-flight", str(3 * 512 * MINIMAX_TINY["hidden_size"] * 4)]  # so that not all is in the first wave
    driver = cluster.start("env", "PYTHONPATH=.", sys.executable, SCRIPT, str(10**9), "none", *flags)
    wait_for_commits(run, 1, driver)
    os.kill(max(stage_processes(cluster, "ActorWithSmallStages")), signal.SIGKILL)
    printed, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, printed
    assert "died: restarted" in printed
    assert_equals_transformers(run, minimax, range(MINIMAX_TINY["layers"]))
    assert folder.is_dir()
    assert not list(folder.iterdir()), "nothing is left there"


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_new_limit_kept(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    flags = words(minimax, prompts, run, "--stages", "2")
    flags[flags.index("--batch-tokens") + 1] = "400"
    done = extract(cluster, 210, "1", flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("found no room in the layers 0-") == 1, "one line, and the limit is kept"
    assert max(count * length for count, length in shapes(run)) <= 210
    assert any(count > 1 for count, _ in shapes(run)), "no smaller than need be"
    assert_equals_transformers(run, minimax, range(MINIMAX_TINY["layers"]))


def test_a_single_sequence_that_does_not_fit_stops_the_run_with_what_would_help(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    done = extract(cluster, 20, "1", words(minimax, prompts, run))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 sequences of" in done.stderr + done.stdout
    assert "begin another run with a lower max_length" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    again = cluster.run("m2ray", "extract", *words(minimax, prompts, run))
    assert again.returncode == 0, again.stdout + again.stderr
    assert_equals_transformers(run, minimax, range(MINIMAX_TINY["layers"]))
