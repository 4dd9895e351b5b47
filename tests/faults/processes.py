"""Faults of processes: stages, drivers and nodes that are killed, stopped or hang. Each gives how many it killed."""

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.scene import Scene
from tests.faults.server import FaultyServer
from tests.reference import other_weights

_CRASH_LOOP_S = 25.0
_LONG_S = 60.0
_OUTLIVED_S = 120.0
"""Within this a second driver starts and gives the first one up, for which it waits 20 s."""


def stage_killed(scene: Scene) -> int:
    return _strike(scene, _any_stage(scene))


def all_stages_killed(scene: Scene) -> int:
    return _strike(scene, scene.stages())


def newcomer_killed(scene: Scene) -> int:
    """A stage, and at once the process that takes its place, most often while it loads."""
    victims, before = _any_stage(scene), scene.cluster.stage_pids()
    kills = _kill(victims)
    scene.wait_until("a stage is restarted", lambda: bool(scene.cluster.stage_pids() - before))
    return kills + _strike(scene, scene.cluster.stage_pids() - before)


def crash_loop(scene: Scene) -> int:
    """One stage after the other dies, faster than they come back: until the chain gives up, or for a while."""
    kills, deadline = 0, time.monotonic() + _CRASH_LOOP_S
    while scene.driver.is_running and time.monotonic() < deadline:
        kills += _kill(sorted(scene.cluster.stage_pids())[:1])
        time.sleep(scene.chance.uniform(0.5, 2.0))
    return kills


def killed_in_put(scene: Scene) -> int:
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
    others, restarts = {pid: _read_bytes(pid) for pid in scene.stages()}, scene.driver.num_restarts
    caught: list[int] = []
    is_lost = scene.chance.random() < 0.5

    def catch(path: str, port: int) -> bool:
        if caught or "/data/" not in path:
            return False
        for pid in others:
            with suppress(psutil.Error):
                if any(each.laddr.port == port for each in psutil.Process(pid).net_connections("tcp")):
                    caught.append(pid)
                    _signal(pid, signal.SIGKILL)
                    return is_lost
        return False

    server.proxy.before_put = catch
    scene.wait_until("a stage sends a PUT", lambda: bool(caught), 30.0)
    server.proxy.before_put = lambda path, port: False
    _require_others(scene, caught, others, restarts)
    return len(caught)


def node_killed(scene: Scene) -> int:
    """The node of a stage, with all that runs there; another node joins at once."""
    stages, victims = scene.stages(), _any_stage(scene)
    if not any(scene.cluster.kill_node_of(pid) for pid in victims):
        return 0
    scene.cluster.add_node()
    _await_stages(scene, [pid for pid in stages if not psutil.pid_exists(pid)])
    scene.cluster.wait_for_nodes()
    return 1


def driver_killed(scene: Scene) -> int:
    kills = int(scene.driver.kill())
    scene.wait_until("the killed driver was gone", lambda: False)
    return kills


def weights_replaced(scene: Scene) -> int:
    """Other weights of the same sizes take the files' place, and a stage is killed: what it loads then has to be refused."""
    scene.wait_until("the run records its weights", lambda: Path(scene.driver.output, "weights.json").exists())
    with other_weights(scene.driver.model):
        kills = _kill(_any_stage(scene))
        scene.wait_until("the driver refused other weights", lambda: False)
    if scene.driver.exit_code and "The weights that the stages have loaded are not those of the run" not in scene.driver.error:
        scene.problems.append(f"other weights were not refused by name: {scene.driver.error}")
    return kills


def driver_outlived(scene: Scene) -> int:
    """A driver stands still until a second one has taken the run over, and goes on then; the second one gets a Ctrl-C once the first is gone."""
    if not scene.driver.pause():
        return 0
    second = scene.driver.another()
    try:
        deadline = time.monotonic() + _OUTLIVED_S
        while second.is_running and "takes the run over" not in second.printed and time.monotonic() < deadline:
            time.sleep(0.1)  # looks again; nothing rests on the interval
        if "takes the run over" not in second.printed:
            scene.problems.append(f"a driver without a sign was not outlived: {second.printed[-2000:]}")
        scene.driver.go_on()
        scene.wait_until("the driver that was outlived stopped", lambda: False)
        second.interrupt()
        second.wait(60.0)
    finally:
        scene.driver.go_on()
        second.end()
    return 0


def stage_hung(scene: Scene) -> int:
    victims = _any_stage(scene)
    for pid in victims:
        _signal(pid, signal.SIGSTOP)
    _await_stages(scene, victims)
    return 0


def job_stopped(scene: Scene) -> int:
    scene.driver.ask_to_stop()
    scene.wait_until("the driver stopped", lambda: False)
    return 0


def _any_stage(scene: Scene) -> list[int]:
    """One stage by the seed; none if the driver ended."""
    stages = scene.stages()
    return scene.chance.sample(stages, min(1, len(stages)))


def _strike(scene: Scene, victims: Iterable[int]) -> int:
    """SIGKILL these stages. The others must keep their processes and their weights."""
    victims = list(victims)
    others, restarts = {pid: _read_bytes(pid) for pid in scene.cluster.stage_pids()}, scene.driver.num_restarts
    kills = _kill(victims)
    _require_others(scene, victims, others, restarts)
    return kills


def _require_others(scene: Scene, victims: Iterable[int], before: Mapping[int, int], restarts: int) -> None:
    """Wait for the victims' successors. Whoever else was there `before` must be there still and have read no weights since."""
    began = time.monotonic()
    now = _await_stages(scene, victims)
    if not now or scene.driver.num_restarts > restarts + 1:
        return  # with several failures in a row, the second strikes those that the first one spared
    took_long = time.monotonic() - began > _LONG_S  # by then a process has read as much of /proc
    for pid, read_bytes in before.items():
        if pid not in victims and pid not in now:
            scene.problems.append(f"stage process {pid} was not killed, but did not stay")
        elif pid not in victims and scene.is_loaded and not took_long and _read_bytes(pid) - read_bytes >= scene.span_bytes:
            scene.problems.append(f"stage process {pid} was not killed, but read {_read_bytes(pid) - read_bytes} bytes again")


def _await_stages(scene: Scene, victims: Iterable[int]) -> set[int]:
    """Wait until others stand in the victims' places. Gives all stages as they were then; none if the driver ended before."""
    gone, whole = set(victims), set()

    def is_whole() -> bool:
        now = scene.cluster.stage_pids()
        if len(now) == scene.num_processes and not now & gone:
            whole.update(now)  # not listed again later: a run that completes ends its stages before its driver
        return bool(whole)

    scene.wait_until("the stages are whole again", is_whole)
    return whole


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
