"""A job of two stages on two nodes of one machine, one with its layers packed and one whose layers are brought, struck in the middle of its waves.

Where the machine has a GPU each node counts it, so that each stage has a part of it, as `max_memory` says for its node.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ray.conftest import REPOSITORY, START_TIMEOUT_S, RayCluster, end_node, environment, free_ports, ray_head
from tests.ray.test_extract import wait_for_commits
from tests.ray.test_faults import assert_same_run, stage_processes
from tests.reference import MINIMAX_TINY

WORKER = "127.0.0.2"
"""The worker's address."""

TIMEOUT_S = 180.0


@contextmanager
def two_node_cluster(num_gpus: int = 0) -> Iterator[RayCluster]:
    """A head and a worker, each with so many GPUs; the worker has a label and an NCCL variable of its own."""
    with ray_head(num_cpus=2, num_gpus=num_gpus) as head:
        for _ in range(3):  # a port that was free may be another process's by the time Ray wants it
            with _worker_node(head, num_gpus) as worker:
                if _has_joined(head, worker):
                    said("both nodes are there")
                    yield head
                    return
        pytest.fail("the second node did not start")


@contextmanager
def _worker_node(head: RayCluster, num_gpus: int) -> Iterator[subprocess.Popen[bytes]]:
    (agent_port,) = free_ports(1)
    words = ["ray", "start", "--block", f"--address={head.env['RAY_ADDRESS']}", "--num-cpus=1", f"--num-gpus={num_gpus}", "--labels=kind=b"]
    words += [f"--node-ip-address={WORKER}", f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"]
    env = {**head.env, "NCCL_DEBUG": "WARN"}
    worker = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield worker
    finally:
        end_node(worker)


def _has_joined(head: RayCluster, worker: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while worker.poll() is None and time.monotonic() < deadline:
        if head.run("ray", "status").stdout.count(" node_") >= 2:
            return True
    return False


@contextmanager
def undisturbed(words: Sequence[str], run: Path) -> Iterator[None]:
    """Meanwhile run the same with layers that are ready, in a process of its own; and wait for its end."""
    with (run.parent / "undisturbed.log").open("w+") as log:
        alone = [sys.executable, "-m", "m2ray.cli", "extract", *words, "--stages", "1", "--output", str(run)]
        process = subprocess.Popen(alone, env=environment(), cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
            assert process.wait(2 * TIMEOUT_S) == 0, Path(log.name).read_text()
        finally:
            process.kill()
            process.wait()
        said("the run with ready layers has ended")


def assert_struck_in_waves_gives_the_rows_of_ready_layers(
    cluster: RayCluster, words: Sequence[str], batch_tokens: int, folder: Path
) -> str:
    """Kill the second stage within a wave, stop the job within another, submit it again; and compare with a run that nobody strikes.

    Returns what the first job printed.
    """
    run, in_waves = folder / "run", [*words, *in_waves_of_two(batch_tokens)]
    max_memory, node = second_too_small(cluster, in_waves)
    job = ["python", "jobs/extract.py", *in_waves, "--offload", "disk", "--max-memory", max_memory, "--output", str(run)]
    with undisturbed(words, folder / "undisturbed"):
        first = cluster.start(*submit(cluster, "first"), *job)
        process = stage_on(cluster, node, first)  # looked for before there is a row: from the first commit to the last it may be a second
        wait_for_commits(run, 1, first)
        stop_within_a_wave(process, run, first, set())
        os.kill(process, signal.SIGKILL)
        printed = stopped_within_a_wave(cluster, first, stage_on(cluster, node, first, process), run)
        assert "died: restarted" in printed, printed
        submit_again(cluster, job, run)
    assert_same_run(run, folder / "undisturbed")
    return printed


def stopped_within_a_wave(cluster: RayCluster, job: subprocess.Popen[str], process: int, run: Path) -> str:
    """Stop the job while `process`, its second stage's, is within a wave that nothing was seen of yet. Returns what the job printed."""
    stop_within_a_wave(process, run, job, within_a_wave(run))
    stopped = cluster.run("ray", "job", "stop", "--address", cluster.dashboard, "first")  # which the wave cannot end before
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    printed, _ = job.communicate(timeout=TIMEOUT_S)
    said("the job has stopped")
    assert not (run / "_SUCCESS").exists(), printed
    return printed


def submit_again(cluster: RayCluster, job: Sequence[str], run: Path) -> None:
    again = cluster.run(*submit(cluster, "again"), *job)
    assert (run / "_SUCCESS").exists(), again.stdout + again.stderr
    said("the job that was submitted again has ended")


def said(what: str) -> None:
    """For whoever waits: pytest shows it with `-s`, and where the test fails."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)  # noqa: T201 - what it is for


def in_waves_of_two(batch_tokens: int) -> list[str]:
    """Options of two stages with packed layers, whose waves are of two micro-batches."""
    return ["--stages", "2", "--weights", "packed", "--in-flight", str(3 * 2 * batch_tokens * MINIMAX_TINY["hidden_size"] * 4)]


def submit(cluster: RayCluster, name: str) -> list[str]:
    return ["ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", name, "--working-dir", ".", "--"]


def second_too_small(cluster: RayCluster, words: Sequence[str]) -> tuple[str, str]:
    """`max_memory` by which the first stage has room for its layers, packed, and the second lacks a byte, though not to take them in turn; its node."""
    done = cluster.run("m2ray", "plan", "--json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (stage | stage["host"] for stage in json.loads(done.stdout)["stages"])
    short_bytes = second["peak_bytes"] - second["running"]["wave"] - 1
    return f"{first['node']}={first['peak_bytes']};{second['node']}={short_bytes}", second["node"]


def stage_on(cluster: RayCluster, node: str, job: subprocess.Popen[str], killed: int = 0) -> int:
    """The process of the stage there, once there is one besides the one that was killed."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := [process for process in stage_processes(cluster) - {killed} if on_worker(process) == (node == WORKER)]):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, f"no stage on {node}"
        time.sleep(0.05)  # polls
    said(f"there is a stage on {node}")
    return found[0]


def on_worker(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(f"--node-ip-address={WORKER}" in parent.cmdline() for parent in psutil.Process(process).parents())
    return False


def within_a_wave(run: Path) -> set[str]:
    """Parts of the second stage's first layer of which the next layer has none: a wave has gone through the one and not the other."""
    one, other = ({path.name for path in run.glob(f"data/site=residual/layer={layer:03}/shard-*.parquet")} for layer in (3, 4))
    return one - other


def stop_within_a_wave(process: int, run: Path, job: subprocess.Popen[str], left: set[str]) -> None:
    """Stop the second stage's process (SIGSTOP) within a wave; `left` are the parts of one that was within it before."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        if within_a_wave(run) - left:
            os.kill(process, signal.SIGSTOP)
            if within_a_wave(run) - left:
                said(f"the stage is within a wave, {len(list((run / '_commits').glob('shard-*')))} shards are committed")
                return
            os.kill(process, signal.SIGCONT)
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "no wave was seen"
        time.sleep(0.001)  # polls a folder
