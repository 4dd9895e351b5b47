"""A job in a stage: what it takes, the writers of what it captured, and how far the stage is with it."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from m2ray.activations.writing.beside import Beside
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import PartReceipt
from m2ray.chain.status import StageStatus, with_layers, with_micro_batch, with_peaks, with_writer
from m2ray.errors import StoreError
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage
from m2ray.model.stage_output import StageOutput

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from m2ray.activations.writing.capture_writer import CaptureWriter, RowWriter

_CLOSE_S = 60.0


class Job(NamedTuple):
    """What a loaded chain does next: what it takes, where and how that is written, and the padded tokens of a full micro-batch."""

    capture: CaptureSpec
    writer: WriterSpec
    batch_tokens: int


class JobHere:
    """A job that a stage has begun. Any thread may collect, abandon, close or ask for the status.

    Attributes:
        batch_tokens: padded tokens of a full micro-batch.
        is_closed: given up, or done.
    """

    def __init__(self, job: Job, stages: Sequence[Stage], status: StageStatus, beside: Beside | None = None) -> None:
        """Open its writers.

        Args:
            stages: which capture what it takes by now.
            status: of a stage that has done nothing of it.
            beside: the process that writes rows; None for this one.
        """
        self.batch_tokens = job.batch_tokens
        self.is_closed = False
        self._job = job
        self._status = status
        self._began_at: float | None = None
        parts = [part for stage in stages for part in stage.parts]
        self._writer: RowWriter = job.writer.open(parts) if beside is None else beside.open(job.writer, parts)
        self._consumers: tuple[CaptureWriter, ...] = (self._writer,)
        statistics = {place: kinds for stage in stages for place, kinds in stage.statistics.items()}
        if statistics:
            self._consumers = (self._writer, job.writer.open_statistics(statistics))

    def is_of(self, job: Job) -> bool:
        """Whether it is that one."""
        return job == self._job

    def begin_to_compute(self) -> None:
        """A micro-batch is about to be computed; the first one begins the time of which it is asked how much was spent on waiting."""
        self._began_at = self._began_at or time.monotonic()

    def give(self, attempt: str, output: StageOutput, require: Callable[[], None], timeout_s: float, *, leaves: bool) -> None:
        """Wait for what a micro-batch leaves, and give it to the writers, some layers as soon as they are there.

        Args:
            require: raises what is to be raised where the rows are of no use any more, once they are there.
            timeout_s: of each writer, for room in its queue.
            leaves: whether no more comes of this micro-batch: it leaves the last of the stage's devices.

        Raises:
            StageError, StoreError: as `StageOutput.arriving` and `CaptureWriter.submit`.
        """
        assert self._began_at is not None
        for captured in output.arriving():
            require()
            for consumer in self._consumers if captured or leaves else ():
                consumer.submit(attempt, output.micro_batch, captured, timeout_s)
        compute_s, copy_s = output.compute_s, output.copy_s
        since_begin_s = time.monotonic() - self._began_at - self._writer.figures.waited_s
        self._status = with_layers(self._status, compute_s, copy_s, since_begin_s)
        if leaves:
            self._status = with_micro_batch(self._status, output.micro_batch)

    def collect(self, shard: int, attempt: str, timeout_s: float) -> tuple[PartReceipt, ...]:
        """Make durable what came of a complete attempt, and give its receipts. Raises StoreError or StageError: nothing of it is left then."""
        return tuple(receipt for consumer in self._consumers for receipt in consumer.collect(shard, attempt, timeout_s))

    def abandon(self, attempts: Sequence[tuple[int, str]], timeout_s: float) -> None:
        """Give up each (shard, attempt). What the store does not delete soon is no commit's, and goes when the run is finished."""
        for consumer in self._consumers:
            with suppress(StoreError):
                consumer.abandon(attempts, timeout_s)

    def close(self) -> None:
        """End its writers; unfinished parts are given up. Raises StoreError: some could not be deleted."""
        self.is_closed = True
        for consumer in self._consumers:
            consumer.close(_CLOSE_S)

    @property
    def threads(self) -> "Sequence[ThreadPoolExecutor]":
        """Those of its writers: a store that hangs keeps them."""
        return self._writer.threads

    def sends_by(self, transport: str) -> None:
        """Hidden states go to the next stage in this way."""
        self._status = replace(self._status, sends_by=transport)

    def status(self, devices: Sequence[torch.device]) -> StageStatus:
        """How far it is, and what its devices' memory held at most."""
        return with_peaks(with_writer(self._status, self._writer.figures), devices)
