"""The actors of one chain: started in their bundles, ended, and started again there or elsewhere."""

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from m2ray.chain.actor import actor_class
from m2ray.chain.placement import Reservation
from m2ray.chain.status import StageStatus
from m2ray.chain.wave import most_in_chain
from m2ray.errors import ClusterError, StageError
from m2ray.model.stage import StageSpec
from m2ray.option_types import Transport

_POLL_S = 1.0

START_S = 60.0
"""What a worker process with torch may take to start on a busy node."""


class ActorsOfChain(Protocol):
    """One actor a stage, in the order of the layers: this process's own (`Actors`), or those of a chain that stands already."""

    handles: list[Any]

    def start(self, epoch: int) -> None:
        """Start all, in the epoch that the chain is in."""

    def restart(self, lost: Mapping[int, StageStatus | None], epoch: int) -> bool:
        """Start the lost ones again. As `Actors.restart`."""

    def end(self) -> None:
        """Have no more to do with them, from any thread."""


class Actors:
    """Actors that end with this process.

    Args:
        specs: what each stage holds: one spec a device.
        timeout_s: how long a stage may be silent.
        placement_timeout_s: how long a lost bundle may take to come back.
    """

    def __init__(
        self,
        specs: Sequence[Sequence[StageSpec]],
        reservation: Reservation,
        transport: Transport,
        timeout_s: float,
        placement_timeout_s: float,
    ) -> None:
        self._specs = specs
        self._reservation = reservation
        self._transport = transport
        self._timeout_s = timeout_s
        self._placement_timeout_s = placement_timeout_s
        # More threads than micro-batches in flight: Ray may hand them over out of order, and each waits its turn.
        self._class = actor_class(most_in_chain(specs) + 2)
        self._starting = threading.Lock()
        self._ended = False
        self.handles: list[Any] = []

    def require_weights(self, weights: Mapping[int | None, str]) -> None:
        """Have whoever is started from now on refuse weights of other digests than these, by layer."""
        self._specs = [[replace(spec, weights=weights) for spec in of_stage] for of_stage in self._specs]

    def start(self, epoch: int) -> None:
        """Start all, in the epoch that the chain is in."""
        self.handles = []
        for index in range(len(self._specs)):
            self._start(index, epoch)

    def restart(self, lost: Mapping[int, StageStatus | None], epoch: int) -> bool:
        """Start the lost ones again: where they were, or elsewhere if their node is gone.

        Where that does not succeed, the chain gives all its room back, asks for it again, and starts all its stages there.

        Args:
            lost: by stage, what one that hung said last, so that its process can be found; None for one that died.

        Returns:
            Whether the others kept their processes.

        Raises:
            ClusterError: there is no room any more.
        """
        self._replace(lost, epoch)
        if self._have_come_back(list(lost), epoch):
            return True
        self.kill()
        self._reservation.renew(self._placement_timeout_s)
        self.start(epoch)
        return False

    def kill(self) -> None:
        """End all at once."""
        for actor in self.handles:
            ray.kill(actor)

    def end(self) -> None:
        """End all for good, from any thread: what another thread is about to start is not started any more."""
        with self._starting:
            self._ended = True
            self.kill()

    def _have_come_back(self, lost: Sequence[int], epoch: int) -> bool:
        deadline = time.monotonic() + self._timeout_s + self._placement_timeout_s + START_S
        refs = [self.handles[index].status.remote() for index in lost]
        while time.monotonic() < deadline:
            if len(ray.wait(refs, num_returns=len(refs), timeout=_POLL_S)[0]) == len(refs):
                return True
            # Ray takes a few seconds to notice that a node is gone.
            gone = self._reservation.gone(lost)
            if gone:
                try:
                    self._reservation.replace(gone, self._placement_timeout_s)
                except ClusterError:
                    return False
                self._replace(dict.fromkeys(gone), epoch)
                refs = [self.handles[index].status.remote() for index in lost]
        return False

    def _replace(self, lost: Mapping[int, StageStatus | None], epoch: int) -> None:
        for index, hung in lost.items():
            ray.kill(self.handles[index])
            if hung is not None:
                _end_process(hung)
            self._start(index, epoch)

    def _start(self, index: int, epoch: int) -> None:
        """Start one and put it in its place. Raises StageError once the chain has ended."""
        specs = self._specs[index]
        room = self._reservation.rooms[index]
        with self._starting:
            if self._ended:
                raise StageError("The chain was ended.")
            actor = self._class.options(
                num_cpus=room.num_cpus,
                num_gpus=room.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(*self._reservation.places[index]),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(specs[0].threads)}},
            ).remote(specs, transport=self._transport, timeout_s=self._timeout_s, epoch=epoch)
            self.handles[index : index + 1] = [actor]


def _end_process(hung: StageStatus) -> None:
    """End a stage's process from its node: Ray asks the process to end itself, and one that is stopped does not."""
    here = NodeAffinitySchedulingStrategy(hung.node_id, soft=False)
    with suppress(RayError):
        ray.get(_end.options(scheduling_strategy=here).remote(hung.pid), timeout=START_S)


@ray.remote(num_cpus=0, max_retries=0)
def _end(pid: int) -> None:
    """End the process of a stage on this node, unless it is gone or the number is another's by now."""
    with suppress(FileNotFoundError, ProcessLookupError):
        if b"StageActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
