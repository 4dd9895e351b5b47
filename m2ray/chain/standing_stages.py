"""The stages of a chain that stays: loaded, looked after and asked by its keeper."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from m2ray.batches import CapturedLayer, MicroBatch
from m2ray.chain.actors import Actors
from m2ray.chain.status import StageStatus
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec

_TICK_S = 1.0
_CLOSE_S = 90.0


def of_any_sites(specs: Sequence[Sequence[StageSpec]]) -> list[list[StageSpec]]:
    """What stages hold that serve jobs of whatever sites: compiled layers show all that they have, so that no job makes another graph."""
    return [[replace(spec, any_sites=True) for spec in of_stage] for of_stage in specs]


class StandingStages:
    """The actors of a chain and what they hold. Any thread may call.

    Attributes:
        statuses: what each said last, by its index.
        weights: what they loaded first, by layer: they stay of one model, whatever becomes of its files.

    Args:
        timeout_s: how long they may stand still.
    """

    def __init__(self, specs: Sequence[Sequence[StageSpec]], actors: Actors, timeout_s: float) -> None:
        self._specs = specs
        self._actors = actors
        self._timeout_s = timeout_s
        self._mending = threading.Lock()
        self.weights: Mapping[int | None, str] = {}
        self.statuses: dict[int, StageStatus] = {}

    @property
    def handles(self) -> list[Any]:
        """The actors as they are now."""
        return list(self._actors.handles)

    def load(self) -> None:
        """Let all load that have not, and wait while something is read. Raises RayError, also for other weights than at the first time."""
        waiting = [handle.load.remote() for handle in self._actors.handles]
        read_bytes, progressed = -1, time.monotonic()
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_TICK_S)
            ray.get(done, timeout=self._timeout_s)
            self.ask()
            now_read_bytes = sum(status.read_bytes for status in self.statuses.values())
            if now_read_bytes != read_bytes:
                read_bytes, progressed = now_read_bytes, time.monotonic()
            elif time.monotonic() - progressed > self._timeout_s:
                raise GetTimeoutError(f"Loading stood still for {self._timeout_s:g} s.")
        if not self.weights:
            self.statuses = dict(enumerate(ray.get([handle.status.remote() for handle in self._actors.handles], timeout=self._timeout_s)))
            self.weights = {layer: digest for status in self.statuses.values() for layer, digest in status.weights.items()}
            self._actors.require_weights(self.weights)

    def ask(self) -> dict[int, StageStatus | None]:
        """Those that are lost. What the others say is kept."""
        asked = {handle.status.remote(): index for index, handle in enumerate(self._actors.handles)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_TICK_S)
        lost: dict[int, StageStatus | None] = {}
        for ref in ready:
            try:
                self.statuses[asked[ref]] = ray.get(ref, timeout=_TICK_S)
            except RayActorError:
                lost[asked[ref]] = None
            except RayError:
                continue
        return lost

    def restart(self, lost: Mapping[int, StageStatus | None], epoch: int) -> tuple[bool, list[Any]]:
        """Start lost ones again, as `Actors.restart`. Gives whether the others stay, and all as they are then."""
        with self._mending:
            others_stay = self._actors.restart(lost, epoch)
            return others_stay, self.handles

    def mend(self, epoch: int, are_ours: Callable[[], bool]) -> None:
        """Start those that are lost again and load all that are not, unless a job has got the chain meanwhile. Raises RayError or ClusterError."""
        with self._mending:
            lost = self.ask()
            are_loaded = all(status.weights for status in self.statuses.values()) if self.weights else True
            if (lost or not are_loaded) and are_ours():
                for index in lost:
                    self.statuses.pop(index, None)
                if lost:
                    self._actors.restart(lost, epoch)
                self.load()

    def through(self, capture: CaptureSpec, last: int, micro_batch: MicroBatch) -> Iterator[CapturedLayer]:
        """A request's micro-batch through the stages up to that of layer `last`. Raises RayError."""
        needed = [handle for handle, specs in zip(self._actors.handles, self._specs, strict=True) if specs[0].span.start <= last]
        following = needed[0].answer.remote(capture, micro_batch, None, needed[1:])
        while following is not None:
            captured, following = ray.get(following, timeout=2 * self._timeout_s)
            yield from captured

    def give_up(self, epoch: int) -> None:
        """Drop what a job has left on its way: epochs before this one are over. A stage that hangs is ended, and comes back as one that died."""
        asked = {handle.close.remote(): handle for handle in self._actors.handles}
        asked |= {handle.reset.remote(epoch, []): handle for handle in self._actors.handles}
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=_CLOSE_S)
        for ref in late:
            ray.kill(asked[ref])

    def end(self) -> None:
        """End them for good."""
        self._actors.end()
