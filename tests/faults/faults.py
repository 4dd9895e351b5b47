"""The faults: each is a function that strikes the run of a scene, lets it pass, and gives how many processes and nodes it killed."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import psutil

from tests.faults.cluster import Cluster
from tests.faults.disk import SmallDisk
from tests.faults.driver import Driver
from tests.faults.server import FaultyServer

_RECOVERY_S = 150.0
_CRASH_LOOP_S = 25.0


@dataclass
class Scene:
    """A run at work, and what can be done to it.

    Attributes:
        num_processes: the stage actors of all replicas.
        span_bytes: the fewest bytes of weights that a stage loads.
        server: where the run lies; None for the disk.
        is_loaded: whether the stages had their weights before the strike.
        problems: takes what should not have happened.
    """

    cluster: Cluster
    driver: Driver
    num_processes: int
    span_bytes: int
    disk: SmallDisk
    server: FaultyServer | None
    chance: Random
    problems: list[str]
    is_loaded: bool = False

    def stages(self) -> list[int]:
        """The processes of all stages, once they are there; fewer if the driver ended."""
        self.wait_until("all stages are there", lambda: len(self.cluster.stage_pids()) == self.num_processes)
        return sorted(self.cluster.stage_pids())

    def wait_until(self, what: str, condition: Callable[[], bool], timeout_s: float = _RECOVERY_S) -> None:
        """Wait for an event or the driver's end."""
        deadline = time.monotonic() + timeout_s
        while not condition() and self.driver.is_running:
            if time.monotonic() > deadline:
                self.problems.append(f"it took more than {timeout_s:g} s until {what}")
                return
            time.sleep(0.05)  # looks again; nothing rests on the interval

    def last(self, at_least_s: float, at_most_s: float) -> None:
        """Let a condition last for a while, or until the driver ends."""
        deadline = time.monotonic() + self.chance.uniform(at_least_s, at_most_s)
        while self.driver.is_running and time.monotonic() < deadline:
            time.sleep(0.1)


@dataclass(frozen=True)
class Fault:
    """What is done, how often in comparison, and where it can be done."""

    name: str
    strike: Callable[[Scene], int]
    weight: int
    where: Literal["anywhere", "local", "small disk", "s3"] = "anywhere"


# -- processes ------------------------------------------------------------------------------------------------------------


def _stage_killed(scene: Scene) -> int:
    return _strike(scene, scene.chance.sample(scene.stages(), 1))


def _all_stages_killed(scene: Scene) -> int:
    return _strike(scene, scene.stages())


def _newcomer_killed(scene: Scene) -> int:
    """A stage, and at once the process that takes its place, most often while it loads."""
    before = set(scene.stages())
    kills = _kill(scene.chance.sample(sorted(before), 1))
    scene.wait_until("a stage is restarted", lambda: bool(scene.cluster.stage_pids() - before))
    return kills + _strike(scene, scene.cluster.stage_pids() - before)


def _crash_loop(scene: Scene) -> int:
    """One stage after the other dies, faster than they come back: until the chain gives up, or for a while."""
    kills, deadline = 0, time.monotonic() + _CRASH_LOOP_S
    while scene.driver.is_running and time.monotonic() < deadline:
        stages = sorted(scene.cluster.stage_pids())
        kills += _kill(scene.chance.sample(stages, min(1, len(stages))))
        time.sleep(scene.chance.uniform(0.5, 2.0))
    return kills


def _killed_in_put(scene: Scene) -> int:
    """A stage that holds an unfinished file, or waits for the answer to a PUT."""
    return _killed_in_upload(scene, scene.server) if scene.server else _killed_in_file(scene)


def _killed_in_file(scene: Scene) -> int:
    scene.stages()
    caught: list[int] = []

    def catch() -> bool:
        for pid in scene.cluster.stage_pids():
            # Stopped first: between the look and the blow the file could be finished.
            if _is_writing(pid) and _signal(pid, signal.SIGSTOP):
                if _is_writing(pid):
                    caught.append(pid)
                    return True
                _signal(pid, signal.SIGCONT)
        return False

    scene.wait_until("a stage writes a file", catch, 30.0)
    return _strike(scene, caught)


def _killed_in_upload(scene: Scene, server: FaultyServer) -> int:
    survivors = set(scene.stages())
    caught: list[int] = []
    is_lost = scene.chance.random() < 0.5

    def catch(path: str, port: int) -> bool:
        if caught or "/data/" not in path:
            return False
        for pid in survivors:
            with suppress(psutil.Error):
                if any(each.laddr.port == port for each in psutil.Process(pid).net_connections("tcp")):
                    caught.append(pid)
                    _signal(pid, signal.SIGKILL)
                    return is_lost
        return False

    server.proxy.before_put = catch
    scene.wait_until("a stage sends a PUT", lambda: bool(caught), 30.0)
    server.proxy.before_put = lambda path, port: False
    return _strike(scene, caught)


def _node_killed(scene: Scene) -> int:
    stages = scene.stages()
    if not stages:
        return 0
    scene.cluster.kill_node_of(scene.chance.choice(stages))
    scene.cluster.add_node()
    gone = [pid for pid in stages if not psutil.pid_exists(pid)]
    _await_stages(scene, gone)
    scene.cluster.wait_for_nodes()
    return 1


def _driver_killed(scene: Scene) -> int:
    return int(scene.driver.kill())


def _stage_hung(scene: Scene) -> int:
    victims = scene.chance.sample(scene.stages(), 1)
    for pid in victims:
        _signal(pid, signal.SIGSTOP)
    _await_stages(scene, victims)
    return 0


def _job_stopped(scene: Scene) -> int:
    scene.driver.ask_to_stop()
    scene.wait_until("the driver stopped", lambda: False)
    return 0


def _strike(scene: Scene, victims: Iterable[int]) -> int:
    """SIGKILL these stages. The others must keep their processes and their weights."""
    victims = set(victims)
    others = {pid: _read_bytes(pid) for pid in scene.cluster.stage_pids() - victims}
    restarts = scene.driver.num_restarts
    kills = _kill(victims)
    if not kills or not _await_stages(scene, victims) or scene.driver.num_restarts > restarts + 1:
        return kills
    now = scene.cluster.stage_pids()
    for pid, read_bytes in others.items():
        if pid not in now:
            scene.problems.append(f"stage process {pid} was not killed, but did not stay")
        elif scene.is_loaded and _read_bytes(pid) - read_bytes >= scene.span_bytes:
            scene.problems.append(f"stage process {pid} was not killed, but read {_read_bytes(pid) - read_bytes} bytes again")
    return kills


def _await_stages(scene: Scene, victims: Iterable[int]) -> bool:
    """Wait until others stand in the victims' places. Gives whether the driver still runs."""
    gone = set(victims)

    def is_whole() -> bool:
        now = scene.cluster.stage_pids()
        return len(now) == scene.num_processes and not now & gone

    scene.wait_until("the stages are whole again", is_whole)
    return scene.driver.is_running


def _kill(pids: Iterable[int]) -> int:
    return sum(_signal(pid, signal.SIGKILL) for pid in pids)


def _signal(pid: int, signum: signal.Signals) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


def _is_writing(pid: int) -> bool:
    try:
        return any("_unfinished" in os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False


def _read_bytes(pid: int) -> int:
    """Bytes that a process has asked files for so far, whether they came from the disk or not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    return 0


# -- the disk -------------------------------------------------------------------------------------------------------------


def _disk_full_briefly(scene: Scene) -> int:
    return _disk_full(scene, 0.5, 3.0)


def _disk_full_long(scene: Scene) -> int:
    return _disk_full(scene, 30.0, 30.0)


def _disk_full(scene: Scene, at_least_s: float, at_most_s: float) -> int:
    scene.disk.fill()
    scene.last(at_least_s, at_most_s)
    scene.disk.free()
    return 0


# -- the store ------------------------------------------------------------------------------------------------------------


def _server_restarted(scene: Scene) -> int:
    assert scene.server
    scene.server.stop()
    scene.server.start()
    return 0


def _server_gone(scene: Scene) -> int:
    assert scene.server
    scene.server.stop()
    scene.last(30.0, 30.0)
    scene.server.start()
    return 0


def _server_503(scene: Scene) -> int:
    return _every_request(scene, "503")


def _server_slow(scene: Scene) -> int:
    return _every_request(scene, "slow")


def _token_expired(scene: Scene) -> int:
    return _every_request(scene, "expired")


def _every_request(scene: Scene, fault: str) -> int:
    assert scene.server
    scene.server.proxy.lasting = fault
    scene.last(2.0, 20.0)
    scene.server.proxy.lasting = None
    return 0


def _key_revoked(scene: Scene) -> int:
    assert scene.server
    scene.server.revoke_key()
    scene.last(2.0, 20.0)
    scene.server.restore_key()
    return 0


FAULTS = (
    Fault("SIGKILL of a stage", _stage_killed, 6),
    Fault("SIGKILL of all stages at once", _all_stages_killed, 4),
    Fault("SIGKILL of a stage and of its successor", _newcomer_killed, 4),
    Fault("SIGKILL of stage after stage for 25 s", _crash_loop, 2),
    Fault("SIGKILL of a stage in the middle of a put", _killed_in_put, 5),
    Fault("SIGKILL of a whole node", _node_killed, 2),
    Fault("SIGKILL of the driver", _driver_killed, 4),
    Fault("SIGSTOP of a stage", _stage_hung, 1, "local"),
    Fault("job stopped", _job_stopped, 2),
    Fault("disk full, up to 3 s", _disk_full_briefly, 1, "small disk"),
    Fault("disk full, up to 30 s", _disk_full_long, 1, "small disk"),
    Fault("S3 server restarted", _server_restarted, 1, "s3"),
    Fault("S3 server gone for 30 s", _server_gone, 1, "s3"),
    Fault("S3 server answers 503", _server_503, 1, "s3"),
    Fault("S3 server slow", _server_slow, 1, "s3"),
    Fault("S3 token expired", _token_expired, 1, "s3"),
    Fault("S3 key revoked", _key_revoked, 1, "s3"),
)
