"""The driver's side of one chain: keep micro-batches flowing through its stages, gather the receipts, begin anew after a failure.

Only token ids, receipts and numbers pass through the driver: a call to the first stage for each micro-batch, which the stages hand on
by themselves, and one to the last stage for what is complete. All stages are watched for failures.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError

from m2ray.batches import MicroBatch, PartReceipt, Shard
from m2ray.chain.failure import Failure, FailureKind, FailurePolicy, GiveUp, cause_of, classify
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.chain.transport import hidden_bytes
from m2ray.errors import M2rayError, StageError, StageMemoryError
from m2ray.planning.memory import window

_POLL_S = 0.5


class ChainLostError(StageError):
    """A chain's stages failed too often; another replica may still go on."""


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


@dataclass(frozen=True)
class _InFlight:
    """A micro-batch inside the chain, until the last stage is done with it."""

    owner: _OpenShard
    num_bytes: int
    is_last: bool


@dataclass(frozen=True)
class ChainLimits:
    """Bounds of what the chain holds at one time, and how long it may stand still."""

    in_flight_bytes: int
    hidden_size: int
    itemsize_bytes: int
    timeout_s: float


class Chain:
    """All the stages of one model, in order. Used by one thread; `stop` may be set by another.

    Args:
        micro_batches_of: the micro-batches of a shard at a limit of padded tokens, the same every time.
        batch_tokens: the limit, unless less fits.
        say: takes a line for the user.
    """

    _in_flight: deque[_InFlight]
    _open: list[_OpenShard]  # taken from the queue, closing ones too
    _closing: dict[tuple[int, str], _OpenShard]  # by shard and attempt: their receipts are being gathered
    _news: Any  # the call to the last stage that waits for what is complete
    _current: tuple[_OpenShard, Iterator[MicroBatch]] | None
    _upcoming: tuple[_OpenShard, MicroBatch] | None

    def __init__(
        self,
        stages: Stages,
        limits: ChainLimits,
        micro_batches_of: Callable[[Shard, int], Iterator[MicroBatch]],
        batch_tokens: int,
        say: Callable[[str], None],
        policy: FailurePolicy | None = None,
    ) -> None:
        self._stages = stages
        self._limits = limits
        self._micro_batches_of = micro_batches_of
        self._batch_tokens = batch_tokens
        self._say = say
        self._policy = policy or FailurePolicy()
        self._failures: list[Failure] = []
        self._epoch = 0
        self._forget()
        self.stop = threading.Event()
        self.tokens_done = 0

    def run(self, queue: ShardQueue, on_result: Callable[[ShardResult], None]) -> None:
        """Load the stages and take shards from the queue until it is finished or `stop` is set.

        Dead and hung stages are restarted, and the shards in flight then are tried again. However it ends, shards that were
        not handed to `on_result` are given back to the queue.

        Raises:
            M2rayError: what would come again if it were tried again, or what came too often.
        """
        self._stages.start()
        try:
            while not self.stop.is_set() and not queue.is_finished:
                try:
                    self._stages.load(self.stop)
                    if not self.stop.is_set():
                        self._stages.link(self._epoch)
                        self._flow(queue, on_result)
                except (RayError, GetTimeoutError, M2rayError) as error:
                    self._begin_anew(error, queue)
        finally:
            queue.give_back([opened.shard for opened in self._open])

    # -- extracting ---------------------------------------------------------------------------------------------------

    def _flow(self, queue: ShardQueue, on_result: Callable[[ShardResult], None]) -> None:
        """The chain never drains between shards: the next one's micro-batches enter while the last stages still work."""
        progressed, work_done = time.monotonic(), self._stages.work_done
        while not queue.is_finished and not self.stop.is_set():
            self._fill(queue)
            if not self._open:
                queue.wait(_POLL_S)
                progressed = time.monotonic()
                continue
            moved = self._advance(on_result)
            self._stages.ask()
            # What a stage computed or wrote is progress too: a slow chain's first micro-batch comes through late, and so do its last receipts.
            if moved or self._stages.work_done != work_done:
                progressed, work_done = time.monotonic(), self._stages.work_done
            elif time.monotonic() - progressed > self._limits.timeout_s:
                raise GetTimeoutError(f"The chain stood still for {self._limits.timeout_s:g} s: {self._stages.diagnosis()}.")

    def _fill(self, queue: ShardQueue) -> None:
        while True:
            if self._upcoming is None:
                self._upcoming = self._next(queue)
            if self._upcoming is None or not self._has_room(self._upcoming[1]):
                return
            self._submit(*self._upcoming)
            self._upcoming = None

    def _next(self, queue: ShardQueue) -> tuple[_OpenShard, MicroBatch] | None:
        while True:
            if self._current is not None:
                opened, source = self._current
                micro_batch = next(source, None)
                if micro_batch is not None:
                    return opened, micro_batch
                self._current = None
            shard = queue.take()
            if shard is None:
                return None
            opened = _OpenShard(shard, uuid4().hex[:12])
            self._open.append(opened)
            self._current = (opened, iter(self._micro_batches_of(shard, self._batch_tokens)))

    def _has_room(self, micro_batch: MicroBatch) -> bool:
        if not self._in_flight:
            return True
        needed = self._in_flight_bytes + self._hidden_bytes(micro_batch)
        return len(self._in_flight) < window(len(self._stages)) and needed <= self._limits.in_flight_bytes

    def _hidden_bytes(self, micro_batch: MicroBatch) -> int:
        return hidden_bytes(micro_batch.padded_tokens, self._limits.hidden_size, self._limits.itemsize_bytes)

    def _submit(self, owner: _OpenShard, micro_batch: MicroBatch) -> None:
        owner.micro_batches.append((len(micro_batch.sequence_ids), micro_batch.token_ids_BT.shape[1]))
        self._stages.actors[0].take.options(num_returns=0).remote(self._epoch, self._step, owner.attempt, micro_batch, None)
        num_bytes = self._hidden_bytes(micro_batch)
        self._in_flight.append(_InFlight(owner, num_bytes, micro_batch.is_last))
        self._in_flight_bytes += num_bytes
        self._step += 1

    def _advance(self, on_result: Callable[[ShardResult], None]) -> bool:
        """Wait a moment for news of the last stage, and take in what is complete. Raises what a stage failed with."""
        if self._news is None:
            self._news = self._stages.actors[-1].completed.remote(self._epoch, self._steps_done, self._shards_done)
        awaited = [*self._stages.watches, self._news]
        ray.wait(awaited, num_returns=1, timeout=_POLL_S)
        # Failures come first. Asked for one of several that are ready, Ray gives any of them: so all that are ready are looked at.
        ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
        for watch in ready:
            if watch is not self._news:
                self._stages.heed(watch, self._epoch)
        if self._news not in ready:
            return False
        completed = ray.get(self._news, timeout=self._limits.timeout_s)
        self._news = None
        moved = completed.steps > self._steps_done or bool(completed.shards)
        while self._steps_done < completed.steps:
            self._retire(self._in_flight.popleft())
        for gathered in completed.shards:
            self._shards_done += 1
            opened = self._closing.pop((gathered.shard, gathered.attempt))
            self._open.remove(opened)
            elapsed_s = time.monotonic() - opened.began_at
            on_result(ShardResult(opened.shard, opened.attempt, gathered.receipts, tuple(opened.micro_batches), elapsed_s))
        return moved

    def _retire(self, retired: _InFlight) -> None:
        """A micro-batch has left the chain; with a shard's last one the stages are asked for their receipts, down the chain."""
        self._in_flight_bytes -= retired.num_bytes
        if retired.is_last:
            owner = retired.owner
            self._stages.actors[0].gather.remote(self._epoch, self._steps_done, owner.shard.index, owner.attempt, ())
            self._closing[owner.shard.index, owner.attempt] = owner
            self.tokens_done += owner.shard.num_tokens
        self._steps_done += 1

    # -- failures -----------------------------------------------------------------------------------------------------

    def _begin_anew(self, error: RayError | GetTimeoutError | M2rayError, queue: ShardQueue) -> None:
        """Restart what is lost and give the shards in flight back, or raise what ends the chain."""
        if self.stop.is_set():
            return  # the stages are being ended, which looks like death from here
        kind = classify(error)
        if kind is FailureKind.USER:
            raise _as_ours(error)
        self._epoch += 1
        in_flight = self._open
        lost = self._stages.reset(self._epoch, [(opened.shard.index, opened.attempt) for opened in in_flight])
        shards = tuple(opened.shard.index for opened in in_flight)
        self._failures.append(Failure(kind, time.monotonic(), tuple(lost), shards))
        decision = self._policy.decide(self._failures)
        what = "; ".join(f"stage {index} ({self._stages.span(index)}) {why}" for index, why in lost.items())
        what = what or f"the chain {kind.value}: {cause_of(error)}"
        if isinstance(decision, GiveUp):
            if isinstance(cause_of(error), M2rayError):
                raise _as_ours(error)
            raise ChainLostError(
                f"{what}. {decision.why}", "Often a node ran out of memory. Run the same command again: finished shards are kept."
            )
        cause = cause_of(error)
        if isinstance(cause, StageMemoryError):
            self._batch_tokens = cause.num_sequences * cause.length // 2
            self._say(f"{cause.what} Micro-batches of at most {self._batch_tokens} padded tokens from here on.")
        else:
            self._say(f"{what}: restarted, {len(shards)} shards in flight are tried again")
        queue.give_back([opened.shard for opened in in_flight])
        self.tokens_done -= sum(opened.shard.num_tokens for opened in self._closing.values())
        self._forget()
        self.stop.wait(decision.after_s)
        if lost and not self._stages.restart(lost):
            self._say("The room of a lost stage did not come back: all stages of this chain start anew elsewhere")

    def _forget(self) -> None:
        """Nothing is in flight."""
        self._in_flight = deque()
        self._in_flight_bytes = 0
        self._open = []
        self._closing = {}
        self._current = None
        self._upcoming = None
        self._step = 0
        self._steps_done = 0
        self._shards_done = 0
        self._news = None


def _as_ours(error: BaseException) -> M2rayError:
    """The error as it was raised in the stage, or one of ours that tells of it."""
    cause = cause_of(error)
    if isinstance(cause, M2rayError):
        return cause
    return StageError(f"A stage failed: {cause!r}.", "This is a defect of m2ray: --debug shows the trace.")
