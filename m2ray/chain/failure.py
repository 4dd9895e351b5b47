"""What a failure of the chain means, and what is done about it. Pure: no actor is touched here.

A user's error (a damaged checkpoint, a row that is not finite) would come again, so it ends the run. A stage that died or
hung is restarted, a store's refusal is tried again and a wave or a micro-batch without room is halved, but not without end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from m2ray.batches import MicroBatch
from m2ray.chain.calls import CallError
from m2ray.chain.status import StageStatus
from m2ray.errors import M2rayError, StageMemoryError, StoreError


class FailureKind(Enum):
    """Why a chain could not go on."""

    DEATH = "died"
    HANG = "hung"
    LOST = "lost an object"
    STORE = "could not write"
    MEMORY = "ran out of memory"
    USER = "cannot be helped"


@dataclass(frozen=True)
class Failure:
    """One failure of a chain: when, which stages had to be restarted, and which shards were in flight."""

    kind: FailureKind
    at_s: float
    stages: tuple[int, ...]
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Retry:
    """Go on with new attempts, after a pause."""

    after_s: float


@dataclass(frozen=True)
class GiveUp:
    """Stop the chain."""

    why: str


@dataclass(frozen=True)
class FailurePolicy:
    """How often is enough.

    Attributes:
        shard_failures: a shard that was in flight in this many failures ends the chain, and so do as many
            failures within `window_s` that had no shard in flight and lost no stage.
        stage_restarts: of one stage within `window_s`, at most.
        store_retries: how often a shard is tried again after the store refused it.
        patience_s: how long a chain stands still before it counts as hung. Hangs are as far apart, so they have a window of their own.
    """

    shard_failures: int = 6
    stage_restarts: int = 5
    window_s: float = 600.0
    store_retries: int = 3
    patience_s: float = 1800.0

    def decide(self, history: Sequence[Failure]) -> Retry | GiveUp:
        """What to do about the last failure of `history`, which is in the order of time and not empty."""
        last = history[-1]
        if last.kind is FailureKind.USER:
            return GiveUp("The same error would come again.")
        if last.kind is FailureKind.MEMORY:
            return Retry(0.0)  # each time with waves or micro-batches half the size, down to single sequences
        history = [past for past in history if past.kind is not FailureKind.MEMORY]
        for stage in last.stages:
            restarts = sum(stage in past.stages for past in history if self._is_recent(past, last))
            if restarts > self.stage_restarts:
                return GiveUp(f"Stage {stage} failed {restarts} times within {self._window_s(last):g} s.")
        if last.kind is FailureKind.STORE:
            return self._store(history)
        return self._often(history)

    def _often(self, history: Sequence[Failure]) -> Retry | GiveUp:
        """Whether the same shard failed too often, or the chain with no shard begun and no stage lost."""
        last = history[-1]
        for shard in last.shards:
            failures = sum(shard in past.shards for past in history)
            if failures >= self.shard_failures:
                return GiveUp(f"Shard {shard} was in flight in {failures} failures.")
        idle = [past for past in history if not past.shards and not past.stages and self._is_recent(past, last)]
        if last in idle and len(idle) >= self.shard_failures:
            return GiveUp(f"The chain failed {len(idle)} times within {self._window_s(last):g} s with no shard begun and no stage lost.")
        return Retry(0.0)

    def _is_recent(self, past: Failure, last: Failure) -> bool:
        return past.at_s > last.at_s - self._window_s(past)

    def _window_s(self, failure: Failure) -> float:
        """Twice what as many hangs take as are enough, since a restart takes time too."""
        enough = max(self.shard_failures, self.stage_restarts) + 1
        return self.window_s + (2 * enough * self.patience_s if failure.kind is FailureKind.HANG else 0.0)

    def _store(self, history: Sequence[Failure]) -> Retry | GiveUp:
        refused = [past for past in history if past.kind is FailureKind.STORE]
        tries = max((sum(shard in past.shards for past in refused) for shard in refused[-1].shards), default=len(refused))
        if tries > self.store_retries:
            return GiveUp(f"The store refused the same shard {tries} times.")
        return Retry(2.0 ** (tries - 1))


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the stage where an error began: Ray wraps it once for each stage that waited for it."""
    while isinstance(error, RayTaskError | CallError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def classify(error: BaseException) -> FailureKind:
    """The kind of what `ray.get` raised."""
    cause = cause_of(error)
    if isinstance(cause, StageMemoryError) and (cause.in_wave or cause.num_sequences > 1):
        return FailureKind.MEMORY
    if isinstance(cause, StoreError):
        return FailureKind.STORE
    if isinstance(cause, (M2rayError, RayTaskError)):
        return FailureKind.USER
    if isinstance(cause, RayActorError):
        return FailureKind.DEATH
    if isinstance(cause, GetTimeoutError):
        return FailureKind.HANG
    is_rays = type(cause).__module__.startswith("ray.")
    return FailureKind.LOST if is_rays else FailureKind.USER


_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
"""torch has no class of its own for it on a CPU."""


def as_memory_error(error: RuntimeError, micro_batch: MicroBatch, stage: StageStatus, wave_tokens: int = 0) -> StageMemoryError | None:
    """The error by which the driver tries a smaller micro-batch than this one of `stage`; None if `error` is no lack of memory.

    Args:
        wave_tokens: padded tokens of the wave that it was in with others; 0 where it was alone.
    """
    if not isinstance(error, torch.OutOfMemoryError) and _CPU_OUT_OF_MEMORY not in str(error):
        return None
    num_sequences, length = micro_batch.token_ids_BT.shape
    what = f"{num_sequences} sequences of {length} padded tokens"
    if wave_tokens:
        what = f"A wave of {wave_tokens} padded tokens"
    return StageMemoryError(
        f"{what} found no room in the {stage.span} ({stage.device} of node {stage.node}): {str(error).splitlines()[0]}",
        "Spread the layers over more GPUs (stages, gpus_per_stage), lower what others use there, or begin another run with a lower max_length.",
        num_sequences,
        length,
        bool(wave_tokens),
    )
