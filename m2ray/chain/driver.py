"""The driver's side of one chain: keep micro-batches flowing through its stages, gather the receipts, go on after a failure.

Only token ids, receipts and numbers pass through the driver: a call to the first stage for each micro-batch, which the stages hand on
by themselves, and one to the last stage for what is complete. All stages are watched for failures.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from ray.exceptions import GetTimeoutError, RayError

from m2ray.batches import MicroBatch, PartReceipt, Shard
from m2ray.chain.failure import Failure, FailureKind, FailurePolicy, GiveUp, cause_of, classify
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.errors import M2rayError, StageError, StageMemoryError

_POLL_S = 0.5


class ChainLostError(StageError):
    """A chain's stages failed too often; another replica may still go on."""


@dataclass
class ShardAttempt:
    """A try at a shard: its micro-batches go through the chain, then its receipts are gathered, then it is ready to be committed.

    `micro_batches` are (sequences, padded length) of each, in order.
    """

    shard: Shard
    attempt: str
    began_at: float = field(default_factory=time.monotonic)
    micro_batches: list[tuple[int, int]] = field(default_factory=list)
    receipts: tuple[PartReceipt, ...] = ()
    elapsed_s: float = 0.0


class _Epoch:
    """What is on its way since the chain began, or since its last failure, which puts a fresh one in its place.

    Attributes:
        open: by shard and attempt, all that were taken from the queue and are not complete.
        source: the attempt that is being cut into micro-batches; upcoming: a micro-batch that waits for room.
        in_flight: micro-batches inside the chain, until the last stage is done with them.
        steps: micro-batches that entered the chain. marked: the last of them of which the stages know that no more come before something leaves.
        shards_done: attempts that are complete.
        leaving_tokens: of attempts whose receipts are being gathered.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.open: dict[tuple[int, str], ShardAttempt] = {}
        self.source: tuple[ShardAttempt, Iterator[MicroBatch]] | None = None
        self.upcoming: tuple[ShardAttempt, MicroBatch] | None = None
        self.in_flight: deque[tuple[ShardAttempt, MicroBatch]] = deque()
        self.in_flight_bytes = 0
        self.steps = 0
        self.marked = -1
        self.shards_done = 0
        self.leaving_tokens = 0

    @property
    def steps_done(self) -> int:
        return self.steps - len(self.in_flight)

    @property
    def shards(self) -> list[Shard]:
        """Those that go back to the queue if the epoch ends here."""
        return [opened.shard for opened in self.open.values()]


class Chain:
    """All the stages of one model, in order. Used by one thread; `stop` may be set by another.

    Args:
        micro_batches_of: the micro-batches of a shard at a limit of padded tokens, the same every time.
        batch_tokens: the limit, unless less fits.
        say: takes a line for the user.
        in_flight_bytes: hidden states that the chain holds at one time, at most; hidden_bytes: those of one token.
        timeout_s: how long it may stand still.
    """

    def __init__(
        self,
        stages: Stages,
        micro_batches_of: Callable[[Shard, int], Iterator[MicroBatch]],
        batch_tokens: int,
        say: Callable[[str], None],
        *,
        in_flight_bytes: int,
        hidden_bytes: int,
        timeout_s: float,
        policy: FailurePolicy | None = None,
    ) -> None:
        self._stages = stages
        self._micro_batches_of = micro_batches_of
        self._batch_tokens = batch_tokens
        self._say = say
        self._in_flight_bytes = in_flight_bytes
        self._hidden_bytes = hidden_bytes
        self._timeout_s = timeout_s
        self._policy = policy or FailurePolicy(patience_s=timeout_s)
        self._failures: list[Failure] = []
        self._epoch = _Epoch(stages.epoch)
        self.stop = threading.Event()
        self.tokens_done = 0

    @property
    def failures(self) -> Sequence[Failure]:
        """Those after which it went on, and the last one if that ended it."""
        return tuple(self._failures)

    def run(self, queue: ShardQueue, on_result: Callable[[ShardAttempt], None]) -> None:
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
                        self._stages.link(self._epoch.number)
                        self._flow(queue, on_result)
                except (RayError, M2rayError) as error:
                    self._go_on(error, queue)
        finally:
            queue.give_back(self._epoch.shards)

    # -- extracting ---------------------------------------------------------------------------------------------------

    def _flow(self, queue: ShardQueue, on_result: Callable[[ShardAttempt], None]) -> None:
        """The chain never drains between shards: the next one's micro-batches enter while the last stages still work."""
        progressed, work_done = time.monotonic(), self._stages.work_done
        while not queue.is_finished and not self.stop.is_set():
            self._fill(queue)
            if not self._epoch.open:
                queue.wait(_POLL_S)
                progressed = time.monotonic()
                continue
            moved = self._advance(on_result)
            self._stages.ask()
            # What a stage computed or wrote is progress too: a slow chain's first micro-batch comes through late, and so do its last receipts.
            if moved or self._stages.work_done != work_done:
                progressed, work_done = time.monotonic(), self._stages.work_done
            elif time.monotonic() - progressed > self._timeout_s:
                raise GetTimeoutError(f"The chain stood still for {self._timeout_s:g} s: {self._stages.diagnosis()}.")

    def _fill(self, queue: ShardQueue) -> None:
        epoch = self._epoch
        while True:
            epoch.upcoming = epoch.upcoming or self._next(queue)
            if epoch.upcoming is None or not self._has_room(epoch.upcoming[1]):
                return self._mark()
            self._submit(*epoch.upcoming)
            epoch.upcoming = None

    def _mark(self) -> None:
        """Let no wave wait for more, unless something is sure to leave the chain: all up to a marked micro-batch does."""
        epoch = self._epoch
        if epoch.in_flight and epoch.marked < epoch.steps_done:
            epoch.marked = epoch.steps - 1
            self._stages.mark(epoch.number, epoch.marked)

    def _next(self, queue: ShardQueue) -> tuple[ShardAttempt, MicroBatch] | None:
        epoch = self._epoch
        while True:
            if epoch.source is not None:
                opened, source = epoch.source
                micro_batch = next(source, None)
                if micro_batch is not None:
                    return opened, micro_batch
                epoch.source = None
            shard = queue.take()
            if shard is None:
                return None
            opened = ShardAttempt(shard, uuid4().hex[:12])
            epoch.open[shard.index, opened.attempt] = opened
            epoch.source = (opened, iter(self._micro_batches_of(shard, self._batch_tokens)))

    def _has_room(self, micro_batch: MicroBatch) -> bool:
        epoch = self._epoch
        if not epoch.in_flight:
            return True
        needed_bytes = epoch.in_flight_bytes + micro_batch.padded_tokens * self._hidden_bytes
        return len(epoch.in_flight) < self._stages.window and needed_bytes <= self._in_flight_bytes

    def _submit(self, opened: ShardAttempt, micro_batch: MicroBatch) -> None:
        epoch = self._epoch
        opened.micro_batches.append((len(micro_batch.sequence_ids), micro_batch.token_ids_BT.shape[1]))
        self._stages.take(epoch.number, epoch.steps, opened.attempt, micro_batch)
        epoch.in_flight.append((opened, micro_batch))
        epoch.in_flight_bytes += micro_batch.padded_tokens * self._hidden_bytes
        epoch.steps += 1

    def _advance(self, on_result: Callable[[ShardAttempt], None]) -> bool:
        """Wait a moment for news, and take in what is complete, unless a stage failed: that comes first, and is raised."""
        epoch = self._epoch
        completed = self._stages.news(epoch.number, epoch.steps_done, epoch.shards_done, _POLL_S)
        failure = self._stages.failed()
        if failure is not None:
            raise failure
        if completed is None:
            return False
        moved = completed.steps > epoch.steps_done or bool(completed.shards)
        while epoch.steps_done < completed.steps:
            self._retire()
        for gathered in completed.shards:
            opened = epoch.open.pop((gathered.shard, gathered.attempt))
            epoch.shards_done += 1
            epoch.leaving_tokens -= opened.shard.num_tokens
            opened.receipts, opened.elapsed_s = gathered.receipts, time.monotonic() - opened.began_at
            on_result(opened)
        return moved

    def _retire(self) -> None:
        """A micro-batch has left the chain; with a shard's last one the stages are asked for their receipts, down the chain."""
        epoch = self._epoch
        step = epoch.steps_done
        opened, micro_batch = epoch.in_flight.popleft()
        epoch.in_flight_bytes -= micro_batch.padded_tokens * self._hidden_bytes
        if micro_batch.is_last:
            self._stages.gather(epoch.number, step, opened.shard.index, opened.attempt)
            epoch.leaving_tokens += opened.shard.num_tokens
            self.tokens_done += opened.shard.num_tokens

    # -- failures -----------------------------------------------------------------------------------------------------

    def _go_on(self, error: RayError | M2rayError, queue: ShardQueue) -> None:
        """Restart what is lost and give the shards in flight back, or raise what ends the chain."""
        if self.stop.is_set():
            return  # the stages are being ended, which looks like death from here
        kind, cause, over = classify(error), cause_of(error), self._epoch
        if kind is FailureKind.USER:
            raise _as_ours(cause)
        lost = self._stages.reset(over.number + 1, list(over.open))
        self.tokens_done -= over.leaving_tokens
        self._failures.append(Failure(kind, time.monotonic(), tuple(lost), tuple(shard.index for shard in over.shards)))
        decision = self._policy.decide(self._failures)
        what = "; ".join(f"stage {index} ({self._stages.span(index)}) {why}" for index, why in lost.items())
        what = what or f"the chain {kind.value}: {cause}"
        if isinstance(decision, GiveUp):
            if isinstance(cause, M2rayError):
                raise cause
            often = (
                "Look at what they wait for (the model's disk or bucket, a GPU), or raise stage_timeout_s."
                if kind is FailureKind.HANG
                else "Often a node ran out of memory, or of room in /dev/shm or the temporary folder: m2ray doctor tells."
            )
            raise ChainLostError(f"{what}. {decision.why}", f"{often} Run the same command again: finished shards are kept.")
        if isinstance(cause, StageMemoryError) and cause.in_wave:
            self._say(f"{cause.what} Waves of half the size from here on.")
        elif isinstance(cause, StageMemoryError):
            self._batch_tokens = cause.num_sequences * cause.length // 2
            self._say(f"{cause.what} Micro-batches of at most {self._batch_tokens} padded tokens from here on.")
        else:
            self._say(f"{what}: restarted, {len(over.shards)} shards in flight are tried again")
        queue.give_back(over.shards)
        self._epoch = _Epoch(over.number + 1)
        self.stop.wait(decision.after_s)
        if lost and not self._stages.restart(lost):
            self._say("The room of a lost stage did not come back: all stages of this chain are started again elsewhere")


def _as_ours(cause: BaseException) -> M2rayError:
    """The error as it was raised in the stage, or one of ours that tells of it."""
    if isinstance(cause, M2rayError):
        return cause
    return StageError(f"A stage failed: {cause!r}.", "This is a defect of m2ray: --debug shows the trace.")
