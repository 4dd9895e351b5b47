"""A Ray cluster of several nodes on one machine, each a process group of its own, so that a whole node can be killed."""

import json
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

from tests.ray.conftest import end_node, environment, free_ports

_START_TIMEOUT_S = 120.0
_OBJECT_STORE_BYTES = 100_000_000
# A dead node is noticed within seconds instead of half a minute.
_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """A head node without room for stages, and worker nodes of one CPU. `env` is what a command needs to reach it."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._gcs_port, dashboard_port, self._client_port = free_ports(3)
        self.folder = folder
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        self._token = secrets.token_hex(32)
        self._node_env = environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self._token, RAY_JOB_STOP_WAIT_TIME_S="30", **_HEALTH_CHECKS, **env
        )
        self.env = {**self._node_env, "RAY_ADDRESS": f"127.0.0.1:{self._gcs_port}"}
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self, num_workers: int) -> None:
        """Start the head and then the workers, and wait until all are there."""
        ports = [f"--port={self._gcs_port}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        ports += [f"--ray-client-server-port={self._client_port}", f"--temp-dir={self.folder}"]
        self._head = self._start("--head", *ports, num_cpus=0)
        self.wait_for_nodes()
        for _ in range(num_workers):
            self.add_node()
            self.wait_for_nodes()  # one that joins while another does may wait for ever

    def add_node(self) -> None:
        """Start one more worker node, without waiting for it."""
        self._nodes.append(self._start(f"--address=127.0.0.1:{self._gcs_port}", num_cpus=1))

    def wait_for_nodes(self) -> None:
        """Wait until every node that was started and not killed is alive for Ray too."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._num_alive() < 1 + len(self._nodes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"The cluster did not start:\n{(self.folder / 'start.log').read_text()}")
            time.sleep(0.3)  # asks again; nothing rests on the interval

    def kill_node_of(self, pid: int) -> bool:
        """SIGKILL every process of the worker node that runs process `pid`, Ray's own and the stages'. Gives whether it ran there."""
        try:
            parents = {parent.pid for parent in psutil.Process(pid).parents()}
        except psutil.NoSuchProcess:
            return False
        node = next((node for node in self._nodes if node.pid in parents), None)
        if node is None:
            return False
        end_node(node)
        self._nodes.remove(node)
        return True

    def stage_pids(self) -> set[int]:
        """The stage actors that are alive. Their environment holds this cluster's token."""
        token, found = f"RAY_AUTH_TOKEN={self._token}".encode(), set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"ray::StageActor" in (folder / "cmdline").read_bytes() and token in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def stages_left(self, timeout_s: float = 30.0) -> set[int]:
        """The stage actors that are there all the while, once a driver has ended."""
        deadline = time.monotonic() + timeout_s
        while (left := self.stage_pids()) and time.monotonic() < deadline:
            time.sleep(0.2)  # looks again; nothing rests on the interval
        return left

    def end(self) -> None:
        """End every process of every node."""
        for node in [*self._nodes, *([self._head] if self._head else [])]:
            end_node(node)

    def _start(self, *words: str, num_cpus: int) -> subprocess.Popen[bytes]:
        (agent_port,) = free_ports(1)
        command = ["ray", "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}", "--num-gpus=0", *words]
        command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"]
        # Nodes of one machine must not hand out the same ports to their workers: the system chooses.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        with (self.folder / "start.log").open("ab") as log:
            return subprocess.Popen(command, env=self._node_env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _num_alive(self) -> int:
        request = Request(f"{self.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {self._token}"})
        try:
            with urlopen(request, timeout=10) as answer:
                nodes = json.load(answer)["data"]["summary"]
        except OSError:  # nothing listens yet
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


@contextmanager
def ray_cluster(num_workers: int, env: Mapping[str, str]) -> Iterator[Cluster]:
    """A started cluster whose nodes have `env` in their environment; all its processes are gone after."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-faults-", dir="/tmp"))  # short: Ray keeps sockets below it
    cluster = Cluster(folder, env)
    try:
        cluster.start(num_workers)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)
