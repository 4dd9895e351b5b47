"""Scene: a run at work, and what can be done to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.faults.cluster import Cluster
from tests.faults.disk import SmallDisk
from tests.faults.driver import Driver
from tests.faults.rows import Watcher
from tests.faults.server import FaultyServer

_RECOVERY_S = 150.0


@dataclass
class Scene:
    """A run at work, and what can be done to it.

    Attributes:
        num_processes: the stage actors of all replicas.
        span_bytes: the fewest bytes of weights that a stage loads.
        server: where the run lies; None for the disk.
        watcher: the reader that sees what is committed.
        num_replicas: chains; while one commits, another may still load.
        is_loaded: whether all stages had their weights before the strike.
        problems: takes what should not have happened.
    """

    cluster: Cluster
    driver: Driver
    num_processes: int
    num_replicas: int
    span_bytes: int
    disk: SmallDisk
    server: FaultyServer | None
    watcher: Watcher
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
