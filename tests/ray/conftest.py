"""One Ray cluster for the ring, started as a user would: `ray start` with a token, ended by its process group."""

import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class RayCluster:
    """A running head node: `env` is what a driver or a `ray job` command needs to reach it, `folder` what Ray keeps its files in."""

    dashboard: str
    env: Mapping[str, str]
    folder: Path

    def run(self, *words: str, timeout_s: float = 240.0, cwd: Path = REPOSITORY, **extra_env: str) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster, from the repository's root or another folder, and capture what it prints."""
        return subprocess.run(words, cwd=cwd, env={**self.env, **extra_env}, capture_output=True, text=True, timeout=timeout_s, check=False)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command against the cluster; the caller ends it."""
        return subprocess.Popen(words, cwd=REPOSITORY, env=dict(self.env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


_NUMBERS = itertools.count(os.getpid() * 997)


def free_ports(count: int) -> list[int]:
    """Below those that the system hands out by itself (from 32,768 on): of these another process may have one before it is listened on here."""
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + next(_NUMBERS) % 12_000
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with this interpreter's folder first, and no trace of another cluster."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", **extra}


@contextmanager
def ray_head(num_cpus: int, num_gpus: int = 0) -> Iterator[RayCluster]:
    """A head node with a dashboard, on free ports of the loopback interface."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-test-", dir="/tmp"))
    gcs_port, dashboard_port, client_port, agent_port = free_ports(4)
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    words = [
        "ray",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs_port}",
        f"--num-cpus={num_cpus}",
        f"--num-gpus={num_gpus}",
    ]
    words += [
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",  # its default is one port: a second cluster on the machine would take no jobs
        f"--ray-client-server-port={client_port}",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]
    log = (folder / "start.log").open("w")
    process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    try:
        _wait_for_jobs(process, dashboard, env, folder)
        yield RayCluster(dashboard, {**env, "RAY_ADDRESS": f"127.0.0.1:{gcs_port}"}, folder)
    finally:
        log.close()
        end_node(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs(process: subprocess.Popen[bytes], dashboard: str, env: Mapping[str, str], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(["ray", "job", "list", "--address", dashboard], env=env, capture_output=True, timeout=60, check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"Ray did not start:\n{(folder / 'start.log').read_text()}")


def end_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL all processes of a node, the one that would start others anew first: Ray takes 15 s to heed a SIGTERM.

    Its workers have process groups of their own, so that the node's is not enough.
    """
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(node.pid)
        for process in [started, *started.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait(30)


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    with ray_head(num_cpus=2) as head:
        yield head
