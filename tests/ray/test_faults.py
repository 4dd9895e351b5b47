"""Stages that die or hang in the middle of the real job, a replica that loses one, and a driver that is asked to stop."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import m2ray
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import minimax, prompts, rows_of, wait_for_commits, words  # noqa: F401 - fixtures among them
from tests.reference import MINIMAX_TINY, same_bits

OPTIONS = ("--in-flight", "1KB", "--shard-tokens", "150", "--stage-timeout-s", "15")
SOON_HUNG = ("--stage-timeout-s", "8")
"""A stage that hangs is waited for twice: until nothing moved for so long, and for its answer."""


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = cluster.run("m2ray", "extract", *words(minimax, prompts, run, *OPTIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def assert_same_run(run: Path, other: Path) -> None:
    """The same rows, each once, and no file that no commit names."""
    ours, theirs = rows_of(run), rows_of(other)
    assert (ours[0] == theirs[0]).all()
    assert same_bits(ours[1], theirs[1])
    assert len(list(run.rglob("shard-*.parquet"))) == len(list(other.rglob("shard-*.parquet")))
    assert (run / "_SUCCESS").exists()


def stage_processes(cluster: RayCluster, name: str = "StageActor") -> set[int]:
    """The stage actors of this cluster, by the name of their class: their environment holds its token."""
    token = f"RAY_AUTH_TOKEN={cluster.env['RAY_AUTH_TOKEN']}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"ray::{name}".encode() in (folder / "cmdline").read_bytes() and token in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.parametrize(("blow", "options"), [(signal.SIGKILL, OPTIONS), (signal.SIGSTOP, (*OPTIONS, *SOON_HUNG))], ids=["died", "hung"])
def test_a_lost_stage_comes_back_alone(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    undisturbed: Path,
    tmp_path: Path,
    blow: signal.Signals,
    options: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    driver = cluster.start("m2ray", "extract", *words(minimax, prompts, run, "--stages", "3", *options))
    wait_for_commits(run, 1, driver)
    before = stage_processes(cluster)
    assert len(before) == 3
    victim = sorted(before)[1]
    os.kill(victim, blow)
    after: set[int] = set()
    while driver.poll() is None:
        after |= stage_processes(cluster)
        time.sleep(0.5)  # looks around now and then; a restarted stage stays longer than that
    printed, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, printed
    assert len(re.findall(rf"\) {'died' if blow == signal.SIGKILL else 'hung'}: restarted", printed)) == 1, printed
    assert after > before - {victim}
    assert len(after - before) == 1, "the other stages keep their processes"
    assert_same_run(run, undisturbed)


def test_a_stopped_job_flushes_and_goes_on_later(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    driver = cluster.start("m2ray", "extract", *words(minimax, prompts, run, "--stages", "2", *OPTIONS))
    wait_for_commits(run, 1, driver)
    driver.send_signal(signal.SIGTERM)
    printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1, printed
    assert "stopped on request" in printed
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed, "Ray's handler came first"
    assert not (run / "_SUCCESS").exists()
    assert m2ray.open_run(run).num_tokens > 0
    assert not list(run.rglob("*.tmp*")), "unfinished files are given up"
    again = cluster.run("m2ray", "extract", *words(minimax, prompts, run, "--stages", "1", *OPTIONS))
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_run(run, undisturbed)


def both_replicas(cluster: RayCluster, driver: subprocess.Popen[str]) -> set[int]:
    """The stage processes of two replicas. Who is there first stands still until the other has imported torch: it could be done with all shards before."""
    deadline, held = time.monotonic() + 120, set[int]()
    try:
        while len(processes := stage_processes(cluster)) < 2 or not all(map(has_torch, processes - held)):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline, f"{len(processes)} of 2 replicas have a process"
            for process in processes - held if not held else ():
                os.kill(process, signal.SIGSTOP)
                held.add(process)
            time.sleep(0.02)  # polls; the first one loads for longer than that
    finally:
        for process in held:
            os.kill(process, signal.SIGCONT)
    return processes


def has_torch(pid: int) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


def node_memory(pid: int) -> set[str]:
    """The memory that a process maps and others of its node may map too, by inode."""
    return {line.split()[4] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:m2ray" in line}


def await_node_memory(pid: int, driver: subprocess.Popen[str]) -> set[str]:
    """That of all layers."""
    deadline = time.monotonic() + 60
    while len(found := node_memory(pid)) < MINIMAX_TINY["layers"]:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"{len(found)} layers"
        time.sleep(0.02)  # polls
    return found


def test_replicas_share_one_queue_and_one_that_loses_a_stage_gives_its_shards_back(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    """Their layers are packed in host memory, of which both have one copy; the one that comes back finds it with the other."""
    run = tmp_path / "run"
    replicas = ("--stages", "1", "--replicas", "2", "--weights", "packed")
    driver = cluster.start("m2ray", "extract", *words(minimax, prompts, run, *replicas, *OPTIONS))
    processes = both_replicas(cluster, driver)
    wait_for_commits(run, 1, driver)
    assert stage_processes(cluster) == processes
    one, other = (await_node_memory(process, driver) for process in processes)
    assert one == other
    os.kill(min(processes), signal.SIGKILL)
    printed, _ = driver.communicate(timeout=150)
    assert driver.returncode == 0, printed
    assert "replica 1 stage 0 on" in printed
    assert_same_run(run, undisturbed)
