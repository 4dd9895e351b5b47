"""ActivationWriter: writes what a stage captured, beside the computation, bounded in bytes.

A micro-batch's layers, all together or as they come, are spread over worker threads. One of these at a time is at a part, whichever is free, so
row groups keep their order and no thread waits while another has parts in line (part_queues.py). Once its last bytes are written, another thread finishes the part: what is durable only after a while (an fsync, the end of an
upload) keeps no thread from writing the next part. An attempt at a shard is *open* from its first micro-batch, *complete* with the
last, *durable* once all its parts are, and *collected* or *abandoned* after that. The first error of any part makes the attempt
*failed*: all its parts are aborted, those already durable too, and whoever calls next gets that error.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from m2ray.activations.schema import Compression, require_compression
from m2ray.activations.writing.attempt import Attempt
from m2ray.activations.writing.backlog import Backlog, Figures
from m2ray.activations.writing.part_queues import PartQueues
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.activations.writing.statistics_writer import StatisticsWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt, PartSpec
from m2ray.errors import M2rayError, StageError, StoreError, raise_all
from m2ray.parquet.column_chunks import EncodedColumns
from m2ray.parquet.crcs import Crcs
from m2ray.selection import Selection
from m2ray.statistics import Place
from m2ray.storage import Store, open_store

_FINISHING_A_THREAD = 4
_LOOK_S = 1.0

_DEFECT = "This is a defect of m2ray."

_Rows = tuple[Sequence[Bits], Sequence[Crcs]]
"""The columns of a CapturedLayer and their CRCs; without its statistics, which need not wait for the store."""


@dataclass(frozen=True)
class WriterSpec:
    """Where and how the stages of a run write, each by a writer of its own: the run folder, and the rest as in ActivationWriter."""

    output: str
    run_metadata: Mapping[str, str]
    queue_bytes: int
    threads: int
    compression: Compression = "none"
    selection: Selection = field(default_factory=Selection)

    def open(self, parts: Sequence[PartSpec]) -> "ActivationWriter":
        """The writer of `parts`. Raises as ActivationWriter and open_store do."""
        store = open_store(self.output)
        return ActivationWriter(
            store,
            self.run_metadata,
            parts,
            queue_bytes=self.queue_bytes,
            threads=self.threads,
            compression=self.compression,
            selection=self.selection,
        )

    def open_statistics(self, places: Mapping[Place, frozenset[str]]) -> StatisticsWriter:
        """The writer of the statistics of these places. Raises as open_store does."""
        return StatisticsWriter(open_store(self.output), places, self.selection)


class ActivationWriter:
    """Writes all the parts of one stage. One thread submits; any thread may collect, abandon or look at the measurements.

    Args:
        store: the run folder.
        run_metadata: what every part's footer says of the run (`JobRecord.run_metadata`).
        parts: what the stage captures of each micro-batch, the same every time, together or in pieces.
        queue_bytes: captured bytes that may wait or be on their way to the store, a part's last row group until the part is durable; one
            layer larger than that waits alone.
        threads: worker threads. As many more, but no more than parts, finish parts, which is to wait for the store.
        compression: how the rows are stored.
        selection: whose rows they are.

    Attributes:
        backlog: what waits, and what the work took so far.

    Raises:
        ConfigError: `compression` is unknown.
    """

    def __init__(
        self,
        store: Store,
        run_metadata: Mapping[str, str],
        parts: Sequence[PartSpec],
        *,
        queue_bytes: int,
        threads: int,
        compression: Compression = "none",
        selection: Selection | None = None,
    ) -> None:
        require_compression(compression)
        self._compression = compression
        self._selection = selection or Selection()
        self._store = store
        self._run_metadata = dict(run_metadata)
        self._parts = tuple(parts)
        self._queues = PartQueues(threads)
        num_finishers = max(1, min(threads, len(parts)))
        self._finishers = ThreadPoolExecutor(num_finishers, thread_name_prefix="finish")
        self._most_finishing = _FINISHING_A_THREAD * num_finishers
        self._changed = threading.Condition()
        self._finishing = 0
        self._attempts: dict[tuple[int, str], Attempt] = {}
        self._is_closed = False
        self._stored_parts = 0
        self.backlog = Backlog(self._changed, queue_bytes)

    @property
    def figures(self) -> Figures:
        """How far it is."""
        of_rows = self.backlog
        waited = of_rows.queued_bytes, of_rows.written_bytes, of_rows.waited_s, of_rows.write_s, of_rows.store_s
        return Figures(*waited, self._stored_parts)

    @property
    def threads(self) -> list[ThreadPoolExecutor]:
        """Those that write, and those that finish."""
        return [self._queues.threads, self._finishers]

    # -- a shard's way ------------------------------------------------------------------------------------------------

    def submit(self, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float) -> None:
        """Queue what was captured of one micro-batch, at all parts or some: a row group each, if any of its tokens is chosen.

        Its arrays must not change until the shard is collected. At each part a shard's micro-batches come in order; those of several shards may
        alternate. Blocks while the queue is full.

        Raises:
            StoreError: an earlier write failed, or the queue stayed full for `timeout_s`. The attempt is failed then.
            StageError: the micro-batch is out of order, its sequences are, or its layers are none of `parts`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._raise_failure()
            opened = self._open_attempt(micro_batch.shard, attempt)
        token_rows, tokens = opened.token_columns(micro_batch, self._selection)
        by_part = opened.matched(len(token_rows), captured)
        specs = [opened.parts[number].spec for number in by_part]
        opened.order.admit(micro_batch, [(spec.site, spec.layer) for spec in specs], token_rows)
        token_digest = opened.order.digest.hexdigest() if micro_batch.is_last else None
        for number, layer in by_part.items():
            self._take_room(opened, _num_bytes(layer.columns, layer.crcs), deadline, timeout_s)
            part = opened.parts[number]
            written = self._queues.submit(part, self._write, opened, part, tokens, (layer.columns, layer.crcs), token_digest)
            written.add_done_callback(lambda done: self._note(opened, done))

    def collect(self, shard: int, attempt: str, timeout_s: float) -> tuple[PartReceipt, ...]:
        """Wait until every part of a complete attempt is durable and give the receipts, in the order of `parts`.

        Raises:
            StoreError: a write failed, or is not done after `timeout_s`. What the attempt has written is deleted then,
                where the store allows it.
            StageError: the attempt is not complete.
        """
        with self._changed:
            opened = self._attempts.get((shard, attempt))
            if opened is None or not (opened.order.is_complete or opened.failure):
                raise StageError(f"Attempt {attempt} of shard {shard} is collected before its last micro-batch.", _DEFECT)
            if not self._changed.wait_for(lambda: opened.failure or opened.receipts() is not None, timeout_s):
                late = StoreError(f"Shard {shard} was not written within {timeout_s:g} s.", "Check the disk of the run folder.")
                self._fail(opened, late)
            if self._attempts.get((shard, attempt)) is not opened:  # given up meanwhile, by whoever waits for its end
                assert opened.failure is not None
                raise opened.failure
            del self._attempts[shard, attempt]
            receipts = opened.receipts()
        if opened.failure is None:
            assert receipts is not None
            return receipts
        # The failure says why. What the same store would not delete either is no commit's, and goes when the run is finished.
        with suppress(StoreError):
            self._end([opened], timeout_s)
        raise opened.failure

    def abandon(self, attempts: Iterable[tuple[int, str]], timeout_s: float = 60.0) -> None:
        """Give up each (shard, attempt) and delete what it has written. One that is not open is left alone.

        Raises:
            StoreError: something of them could not be deleted, or not within `timeout_s` for all together.
        """
        with self._changed:
            opened = [found for each in attempts if (found := self._attempts.pop(each, None)) is not None]
        for each in opened:
            self._fail(each, StageError("The attempt was given up."))
        self._end(opened, timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Give up every attempt that is not collected and end the threads. Raises StoreError as `abandon` does."""
        with self._changed:
            self._is_closed = True
            opened = list(self._attempts.values())
            self._attempts.clear()
        for each in opened:
            self._fail(each, StageError("The writer was closed."))
        try:
            self._end(opened, timeout_s)
        finally:
            for threads in self.threads:
                threads.shutdown(wait=False)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open_attempt(self, shard: int, attempt: str) -> Attempt:
        if (shard, attempt) not in self._attempts:
            parts = [PartWriter(self._store, spec, self._run_metadata, shard, attempt, self._compression) for spec in self._parts]
            self._attempts[shard, attempt] = Attempt(shard, attempt, parts)
        return self._attempts[shard, attempt]

    def _raise_failure(self) -> None:
        if self._is_closed:
            raise StageError("The writer is closed.", _DEFECT)
        for opened in self._attempts.values():
            if opened.failure is not None:
                raise opened.failure

    def _take_room(self, opened: Attempt, num_bytes: int, deadline: float, timeout_s: float) -> None:
        """Take `num_bytes` of the queue, as soon as they are free."""
        if self.backlog.take(num_bytes, lambda: opened.failure, deadline):
            return  # `_write` gives it back, whatever has failed since
        full = StoreError(
            f"Writing fell behind: {self.backlog.queued_bytes} of at most {self.backlog.limit_bytes} bytes still wait after {timeout_s:g} s.",
            "Check the disk of the run folder.",
        )
        self._fail(opened, full)
        assert opened.failure is not None
        raise opened.failure

    def _write(self, opened: Attempt, part: PartWriter, tokens: EncodedColumns, rows: _Rows, token_digest: str | None) -> None:
        """One row group, in the part's turn. With `token_digest` it is the part's last; it counts as queued until the part is durable."""
        num_bytes = _num_bytes(*rows)
        with ExitStack() as undo:
            undo.callback(self.backlog.release, num_bytes)
            if opened.failure is not None:
                return
            with self.backlog.working(part):
                part.append(tokens, *rows)
                if token_digest is not None:
                    part.seal()
            if token_digest is not None and self._may_finish(opened):
                undo.callback(self._finished)
                finished = self._finishers.submit(self._finish, opened, part, num_bytes, token_digest)
                undo.pop_all()
                opened.finishes[part] = finished  # an abort of this part comes after this
                finished.add_done_callback(lambda done: self._note(opened, done))

    def _may_finish(self, opened: Attempt) -> bool:
        """Wait until few enough parts are being finished: each holds an open file or an upload.

        Returns:
            Whether the part may be finished; not if its attempt fails before.
        """
        with self._changed:
            while self._finishing >= self._most_finishing and opened.failure is None:
                self._changed.wait(_LOOK_S)
            if opened.failure is None:
                self._finishing += 1
            return opened.failure is None

    def _finished(self) -> None:
        with self._changed:
            self._finishing -= 1
            self._changed.notify_all()

    def _finish(self, opened: Attempt, part: PartWriter, held_bytes: int, token_digest: str) -> None:
        """Make a part durable. All that may follow in the part's queue is an abort, which waits for this."""
        try:
            if opened.failure is None:
                with self.backlog.working(part):
                    part.finish(token_digest)
                with self._changed:
                    self._stored_parts += 1
        finally:
            self._finished()
            self.backlog.release(held_bytes)

    def _abort(self, opened: Attempt, part: PartWriter) -> None:
        """Delete a part. In its own queue, so that nothing is written any more; a finish that has begun ends first."""
        if part in opened.finishes:
            wait([opened.finishes[part]])
        part.abort()

    def _note(self, opened: Attempt, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._fail(opened, error)
        with self._changed:
            self._changed.notify_all()

    def _fail(self, opened: Attempt, error: BaseException) -> None:
        """Remember an attempt's first error and let each part be aborted, after the work on it so far."""
        with self._changed:
            if opened.failure is None:
                opened.failure = error
                opened.aborts = [self._queues.submit(part, self._abort, opened, part) for part in opened.parts]
                self._changed.notify_all()

    def _end(self, failed: Sequence[Attempt], timeout_s: float) -> None:
        """Wait until nothing of the failed attempts is left."""
        ended, running = wait([abort for opened in failed for abort in opened.aborts], timeout_s)
        problems = [error for error in (abort.exception() for abort in ended) if error is not None]
        if running:
            problems.append(
                StoreError(f"Unfinished files could not be removed within {timeout_s:g} s.", "Check the disk of the run folder.")
            )
        raise_all([problem for problem in problems if isinstance(problem, M2rayError)])
        for problem in problems:
            raise problem


def _num_bytes(columns: Sequence[Bits], crcs: Sequence[Crcs]) -> int:
    return sum(values.nbytes for values in columns) + sum(values.nbytes for values in crcs)
