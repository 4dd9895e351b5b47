"""The driver's side of one chain: start its stages, keep micro-batches flowing through them, gather the receipts.

Only references, receipts and token ids pass through the driver; hidden states go from stage to stage.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from m2ray.batches import MicroBatch, PartReceipt, Shard
from m2ray.chain.actor import StageStatus, WriterSpec, actor_class
from m2ray.chain.placement import Reservation
from m2ray.chain.transport import hidden_bytes
from m2ray.errors import M2rayError, StageError
from m2ray.model.stage import StageSpec

_POLL_S = 1.0


@dataclass(frozen=True)
class ShardResult:
    """A shard that every stage has written: ready to be committed."""

    shard: Shard
    attempt: str
    receipts: tuple[PartReceipt, ...]
    micro_batches: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each, in order."""
    elapsed_s: float


@dataclass
class _OpenShard:
    """A shard on its way: first its micro-batches in the chain, then its receipts from the stages."""

    shard: Shard
    attempt: str
    began_at: float = field(default_factory=time.monotonic)
    micro_batches: list[tuple[int, int]] = field(default_factory=list)
    receipts: list[Any] = field(default_factory=list)
    pending: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _InFlight:
    """A micro-batch inside the chain; `done` resolves when the last stage has computed it."""

    owner: _OpenShard
    done: Any
    num_bytes: int
    tokens: int
    is_last: bool


@dataclass(frozen=True)
class ChainLimits:
    """Bounds of what the chain holds at one time, and how long it may stand still."""

    in_flight_bytes: int
    hidden_size: int
    itemsize_bytes: int
    timeout_s: float


class Chain:
    """All the stages of one model, in order."""

    def __init__(self, stages: Sequence[Any], limits: ChainLimits) -> None:
        self._stages = stages
        self._limits = limits
        self._in_flight: deque[_InFlight] = deque()
        self._in_flight_bytes = 0
        self._closing: list[_OpenShard] = []
        self._step = 0
        self._moved = False
        self._asked: dict[int, Any] = {}
        self._answers: dict[int, StageStatus] = {}
        self.tokens_done = 0

    @classmethod
    def start(
        cls,
        specs: Sequence[StageSpec],
        writer: WriterSpec,
        reservation: Reservation,
        limits: ChainLimits,
        on_status: Callable[[list[StageStatus]], None],
    ) -> "Chain":
        """Start one actor a spec in its reserved bundle and load all spans at the same time.

        Raises:
            M2rayError: whatever a stage reports; StageError if one dies or `limits.timeout_s` pass without progress.
        """
        remote_class = actor_class(_window(len(specs)) + 2)
        stages = [
            remote_class.options(
                num_cpus=reservation.num_cpus,
                num_gpus=reservation.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(reservation.group, bundle),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(spec.threads)}},
            ).remote(spec, writer, hands_on=spec is not specs[-1])
            for spec, bundle in zip(specs, reservation.bundles, strict=True)
        ]
        chain = cls(stages, limits)
        try:
            chain._load(on_status)
        except BaseException:
            chain.kill()
            raise
        return chain

    def extract(
        self, shards: Iterable[Shard], micro_batches_of: Callable[[Shard], Iterator[MicroBatch]], on_tick: Callable[[], None]
    ) -> Iterator[ShardResult]:
        """Take the shards through the chain, several at a time, and give each as soon as all its parts are durable.

        `on_tick` is called about once a second while the chain works.

        The chain never drains between shards: the next one's micro-batches enter while the last stages still work.
        """
        work = self._work(shards, micro_batches_of)
        upcoming = next(work, None)
        progressed = time.monotonic()
        while upcoming or self._in_flight or self._closing:
            while upcoming and self._has_room(upcoming[1]):
                self._submit(*upcoming)
                upcoming = next(work, None)
            results = list(self._advance())
            now = time.monotonic()
            if self._moved:
                progressed = now
            elif now - progressed > self._limits.timeout_s:
                raise StageError(
                    f"The chain stood still for {self._limits.timeout_s:g} s: {self._diagnosis()}.",
                    "Run the same command again: finished shards are kept. stage_timeout_s sets the limit.",
                )
            on_tick()
            yield from results

    def latest_statuses(self) -> list[StageStatus]:
        """The newest answer of each stage that has answered at all, without waiting: a busy stage may be late."""
        for index, stage in enumerate(self._stages):
            asked = self._asked.get(index)
            if asked is not None and ray.wait([asked], timeout=0)[0]:
                (self._answers[index],) = self._get([asked], self._limits.timeout_s)
                asked = None
            if asked is None:
                self._asked[index] = stage.status.remote()
        return [self._answers[index] for index in sorted(self._answers)]

    def close(self) -> None:
        """Let the writers end, then end the actors."""
        try:
            ray.get([stage.close.remote() for stage in self._stages], timeout=self._limits.timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the actors at once."""
        for stage in self._stages:
            ray.kill(stage)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self, on_status: Callable[[list[StageStatus]], None]) -> None:
        waiting = [stage.load.remote() for stage in self._stages]
        read_bytes, progressed = -1, time.monotonic()
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
            self._get(done, self._limits.timeout_s)
            statuses = self.latest_statuses()
            on_status(statuses)
            now_read_bytes = sum(status.read_bytes for status in statuses)
            if done or now_read_bytes != read_bytes:
                read_bytes, progressed = now_read_bytes, time.monotonic()
            elif time.monotonic() - progressed > self._limits.timeout_s:
                raise StageError(
                    f"Loading stood still for {self._limits.timeout_s:g} s: {self._diagnosis()}.",
                    "Check the disk that holds the model; stage_timeout_s sets the limit.",
                )

    # -- extracting ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _work(
        shards: Iterable[Shard], micro_batches_of: Callable[[Shard], Iterator[MicroBatch]]
    ) -> Iterator[tuple[_OpenShard, MicroBatch]]:
        for shard in shards:
            opened = _OpenShard(shard, uuid4().hex[:12])
            for micro_batch in micro_batches_of(shard):
                yield opened, micro_batch

    def _has_room(self, micro_batch: MicroBatch) -> bool:
        if not self._in_flight:
            return True
        needed = self._in_flight_bytes + self._hidden_bytes(micro_batch)
        return len(self._in_flight) < _window(len(self._stages)) and needed <= self._limits.in_flight_bytes

    def _hidden_bytes(self, micro_batch: MicroBatch) -> int:
        return hidden_bytes(micro_batch.padded_tokens, self._limits.hidden_size, self._limits.itemsize_bytes)

    def _submit(self, owner: _OpenShard, micro_batch: MicroBatch) -> None:
        owner.micro_batches.append((len(micro_batch.sequence_ids), micro_batch.token_ids_BT.shape[1]))
        shared = ray.put(micro_batch)
        payload = None
        for stage in self._stages:
            payload = stage.forward.remote(self._step, owner.attempt, shared, payload)
        num_bytes = self._hidden_bytes(micro_batch)
        self._in_flight.append(_InFlight(owner, payload, num_bytes, micro_batch.num_tokens, micro_batch.is_last))
        self._in_flight_bytes += num_bytes
        self._step += 1

    def _advance(self) -> Iterator[ShardResult]:
        """Wait a moment for the chain's oldest micro-batch or a closing shard, and take in whatever is done."""
        waiting = [self._in_flight[0].done] if self._in_flight else []
        # Only what is still to come: a receipt that is there already would count as progress for ever.
        waiting += [ref for opened in self._closing for ref in opened.pending]
        done, _ = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
        self._moved = bool(done)
        while self._in_flight and ray.wait([self._in_flight[0].done], timeout=0)[0]:
            self._retire(self._in_flight.popleft())
        for opened in list(self._closing):
            ready, opened.pending = ray.wait(opened.pending, num_returns=len(opened.pending), timeout=0)
            self._get(ready, self._limits.timeout_s)
            if not opened.pending:
                self._closing.remove(opened)
                receipts = [receipt for receipts in self._get(opened.receipts, self._limits.timeout_s) for receipt in receipts]
                elapsed_s = time.monotonic() - opened.began_at
                yield ShardResult(opened.shard, opened.attempt, tuple(receipts), tuple(opened.micro_batches), elapsed_s)

    def _retire(self, retired: _InFlight) -> None:
        self._get([retired.done], self._limits.timeout_s)
        self._in_flight_bytes -= retired.num_bytes
        self.tokens_done += retired.tokens
        if retired.is_last:
            owner = retired.owner
            owner.receipts = [stage.collect.remote(owner.shard.index, owner.attempt) for stage in self._stages]
            owner.pending = list(owner.receipts)
            self._closing.append(owner)

    # -- failures -----------------------------------------------------------------------------------------------------

    def _get(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """ray.get that raises m2ray's own errors as they were raised in the stage."""
        try:
            values: list[Any] = ray.get(list(refs), timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, M2rayError):
                raise error.cause from error
            if isinstance(error.cause, RayActorError):
                raise self._death(error.cause) from error
            raise StageError(f"A stage failed: {error.cause!r}.", "This is a defect of m2ray: --debug shows the trace.") from error
        except RayActorError as error:
            raise self._death(error) from error
        except GetTimeoutError as error:
            raise StageError(f"No answer from the stages within {timeout_s:g} s: {self._diagnosis()}.") from error
        return values

    def _death(self, error: RayActorError) -> StageError:
        return StageError(
            f"A stage died: {self._diagnosis()}. Ray says: {' '.join(str(error).split())}",
            "Often its node ran out of memory. Run the same command again: finished shards are kept.",
        )

    def _diagnosis(self) -> str:
        """Which stages answer and which do not, in words."""
        words = []
        for index, stage in enumerate(self._stages):
            try:
                status: StageStatus = ray.get(stage.status.remote(), timeout=5.0)
                words.append(f"stage {index} ({status.span}, node {status.node}) has done {status.micro_batches} micro-batches")
            except (RayError, GetTimeoutError) as error:
                words.append(f"stage {index} does not answer ({type(error).__name__})")
        return "; ".join(words)


def _window(num_stages: int) -> int:
    """Micro-batches in the chain at most: two a stage keep each computing while one is handed on, and two to spare."""
    return 2 * num_stages + 2
