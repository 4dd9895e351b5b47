"""ActivationWriter: bounded in bytes, in order, and after a failure nothing is left behind."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from m2ray.activations.job import JobRecord
from m2ray.activations.writing.part_queues import PartQueues
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt, PartSpec
from m2ray.errors import StageError, StoreError
from m2ray.selection import Selection
from m2ray.storage import Data, LocalStore, PartSink
from tests.unit import activation_runs as runs

ATTEMPT = "abc123"


class HookedStore(LocalStore):
    """A local disk that calls `hook(key)` before each write to a part and each end of one, which may wait or raise.

    `close_hook` is called before the ends alone. `late` are the keys of parts that were written to after they had been aborted.
    """

    def __init__(self, root: Path, hook: Callable[[str], object]) -> None:
        super().__init__(root)
        self.hook = hook
        self.close_hook: Callable[[str], object] = lambda _: None
        self.late: list[str] = []

    def open_part(self, key: str) -> PartSink:
        return _HookedSink(super().open_part(key), key, self)


class _HookedSink(PartSink):
    def __init__(self, sink: PartSink, key: str, store: HookedStore) -> None:
        self._sink = sink
        self._key = key
        self._store = store
        self._is_aborted = False

    def write(self, data: Data) -> None:
        if self._is_aborted:
            self._store.late.append(self._key)
        self._store.hook(self._key)
        self._sink.write(data)

    def close(self) -> None:
        self._store.hook(self._key)
        self._store.close_hook(self._key)
        self._sink.close()

    def abort(self) -> None:
        self._is_aborted = True
        self._sink.abort()


def submit(writer: ActivationWriter, record: JobRecord, micro_batch: MicroBatch, timeout_s: float = 10) -> None:
    writer.submit(ATTEMPT, micro_batch, runs.captured(record.parts, micro_batch), timeout_s)


def standing_still(root: Path) -> tuple["HookedStore", threading.Event, threading.Event]:
    """A store that makes nothing durable until the last of these is set; the first is set when it is asked to."""
    store, asked, may_finish = HookedStore(root, lambda _: None), threading.Event(), threading.Event()
    store.close_hook = lambda _: asked.set() or may_finish.wait(20)
    return store, asked, may_finish


def write_shard_0(writer: ActivationWriter, record: JobRecord) -> tuple[PartReceipt, ...]:
    for micro_batch in runs.micro_batches(runs.shard(0)):
        submit(writer, record, micro_batch)
    return writer.collect(0, ATTEMPT, 10)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def files_below(folder: Path) -> list[Path]:
    return [path for path in (folder / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_receipts_say_what_lies_in_the_store(tmp_path: Path, threads: int) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record, threads=threads)
    shard = runs.shard(0)
    receipts = write_shard_0(writer, record)
    assert [(part.site, part.layer) for part in receipts] == [(spec.site, spec.layer) for spec in record.parts]
    for part in receipts:
        data = store.read(part.key)
        assert part.num_bytes == len(data)
        assert part.tail_xxh3 == xxhash.xxh3_64_hexdigest(data[-part.tail_bytes :])
        columns = [group.column(3) for group in map(pq.read_metadata(tmp_path / part.key).row_group, range(2))]
        edges = [0, *(edge for each in columns for edge in (each.data_page_offset, each.data_page_offset + each.total_compressed_size))]
        others = b"".join(data[start:stop] for start, stop in zip(edges[::2], [*edges[1::2], len(data)], strict=True))
        assert part.xxh3 == xxhash.xxh3_64_hexdigest(others), "all but the pages of the activations, which have their CRC"
        assert (part.rows, part.shard, part.attempt) == (shard.num_tokens, 0, ATTEMPT)
        table = pq.read_table(tmp_path / part.key, partitioning=None)
        assert table["sequence_id"].to_pylist() == sorted(table["sequence_id"].to_pylist())
        spec = next(spec for spec in record.parts if spec.layer == part.layer)
        rows = np.concatenate([runs.bits(spec, i) for i in shard.sequence_ids.tolist()])
        assert b"".join(table["activation"].to_pylist()) == rows.tobytes()
    assert writer.backlog.written_bytes == sum(part.num_bytes for part in receipts)
    assert writer.backlog.queued_bytes == 0
    assert 0 < writer.backlog.store_s < writer.backlog.write_s
    writer.close()
    assert len(files_below(tmp_path)) == len(receipts)


def test_the_token_digest_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    shard = runs.shard(0)
    expected = xxhash.xxh3_128_hexdigest(b"".join(Selection().token_rows(each).tobytes() for each in runs.micro_batches(shard)))
    digests = set()
    for size, attempt in ((1, "a1"), (2, "a2"), (4, "a3")):
        writer = runs.writer(store, record)
        for micro_batch in runs.micro_batches(shard, size):
            writer.submit(attempt, micro_batch, runs.captured(record.parts, micro_batch), timeout_s=10)
        digests |= {part.token_digest for part in writer.collect(0, attempt, timeout_s=10)}
        writer.close()
    assert digests == {expected}


def test_several_shards_may_be_open_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    first, second = (runs.micro_batches(runs.shard(index)) for index in (0, 1))
    for micro_batch in (first[0], second[0], second[1], first[1]):
        submit(writer, record, micro_batch)
    assert {part.shard for part in writer.collect(1, ATTEMPT, 10)} == {1}
    assert {part.rows for part in writer.collect(0, ATTEMPT, 10)} == {runs.shard(0).num_tokens}
    writer.close()


def test_the_queue_is_bounded_in_bytes(tmp_path: Path) -> None:
    """With the disk standing still, layers are taken until the next would exceed the bound; then submit waits."""
    may_write, seen = threading.Event(), []

    def hook(key: str) -> None:
        seen.append(writer.backlog.queued_bytes)
        assert may_write.wait(10)

    store = HookedStore(tmp_path, hook)
    record = runs.job(store)
    micro_batches = runs.micro_batches(runs.shard(0))
    layer_bytes = [each.num_tokens * 2 * runs.WIDTH for each in micro_batches]
    room = 3 * layer_bytes[0] + 2 * layer_bytes[1]
    writer = runs.writer(store, record, queue_bytes=room)
    submit(writer, record, micro_batches[0])
    assert writer.backlog.queued_bytes == 3 * layer_bytes[0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(submit, writer, record, micro_batches[1])
        until(lambda: writer.backlog.queued_bytes == room)
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        may_write.set()
        waiting.result(10)
    assert len(writer.collect(0, ATTEMPT, 10)) == len(record.parts)
    assert max(seen) == room
    assert writer.backlog.waited_s > 0
    writer.close()


def test_a_full_queue_times_out(tmp_path: Path) -> None:
    may_write = threading.Event()
    store = HookedStore(tmp_path, lambda _: may_write.wait(10))
    record = runs.job(store)
    micro_batch = runs.micro_batches(runs.shard(0))[0]
    layer_bytes = micro_batch.num_tokens * 2 * runs.WIDTH
    writer = runs.writer(store, record, queue_bytes=layer_bytes)
    with pytest.raises(StoreError, match=rf"Writing fell behind: {layer_bytes} of at most {layer_bytes} bytes"):
        submit(writer, record, micro_batch, timeout_s=0.05)
    may_write.set()
    writer.abandon([(0, ATTEMPT)])
    writer.close()
    assert files_below(tmp_path) == []


def test_a_layer_larger_than_the_queue_goes_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record, queue_bytes=1)
    assert len(write_shard_0(writer, record)) == 3
    writer.close()


def test_a_stage_that_captures_nothing_has_nothing_to_report(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = replace(runs.job(store), parts=())
    writer = runs.writer(store, record)
    assert write_shard_0(writer, record) == ()
    writer.close()


def test_a_part_that_is_being_finished_keeps_no_thread_from_writing_the_next(tmp_path: Path) -> None:
    """With one thread, and the first part's fsync standing still, the next shard is written to its end."""
    may_finish, written = threading.Event(), set()
    store = HookedStore(tmp_path, written.add)
    store.close_hook = lambda _: may_finish.wait(10)
    record = runs.job(store)
    writer = runs.writer(store, record, threads=1)
    first, second = runs.micro_batches(runs.shard(0)), runs.micro_batches(runs.shard(1))
    for micro_batch in (*first, *second):
        submit(writer, record, micro_batch)
    until(lambda: sum("shard-000001" in key for key in written) == len(record.parts))
    assert list(store.list("data")) == []
    may_finish.set()
    assert [len(writer.collect(shard, ATTEMPT, 10)) for shard in (0, 1)] == 2 * [len(record.parts)]
    writer.close()


def test_what_is_not_durable_counts_as_queued(tmp_path: Path) -> None:
    """A part's last row group, until the part is: a disk that syncs nothing is not written to without end."""
    store, _, may_finish = standing_still(tmp_path)
    record = runs.job(store)
    first, second = runs.micro_batches(runs.shard(0)), runs.micro_batches(runs.shard(1))
    held_bytes = len(record.parts) * first[-1].num_tokens * 2 * runs.WIDTH
    writer = runs.writer(store, record, queue_bytes=held_bytes)
    for micro_batch in first:
        submit(writer, record, micro_batch)
    until(lambda: len(writer._attempts[0, ATTEMPT].finishes) == len(record.parts))
    assert writer.backlog.queued_bytes == held_bytes
    with pytest.raises(StoreError, match=rf"Writing fell behind: {held_bytes} of at most {held_bytes} bytes"):
        submit(writer, record, second[0], timeout_s=0.05)
    may_finish.set()
    assert len(writer.collect(0, ATTEMPT, 10)) == len(record.parts)
    assert writer.backlog.queued_bytes == 0
    writer.close()


def test_a_part_given_up_while_it_is_finished_is_deleted_after(tmp_path: Path) -> None:
    store, finishing, may_finish = standing_still(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record, threads=1)
    for micro_batch in runs.micro_batches(runs.shard(0)):
        submit(writer, record, micro_batch)
    assert finishing.wait(10)
    with ThreadPoolExecutor(1) as pool:
        abandoning = pool.submit(writer.abandon, [(0, ATTEMPT)], 10)
        with pytest.raises(TimeoutError):
            abandoning.result(0.05)
        may_finish.set()
        abandoning.result(10)
    assert files_below(tmp_path) == []
    assert list((tmp_path / "_unfinished").iterdir()) == []
    assert writer.backlog.queued_bytes == 0
    writer.close()


def test_an_attempt_given_up_while_it_is_collected_says_so(tmp_path: Path) -> None:
    store, finishing, may_finish = standing_still(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    for micro_batch in runs.micro_batches(runs.shard(0)):
        submit(writer, record, micro_batch)
    with ThreadPoolExecutor(2) as pool:
        collecting = pool.submit(writer.collect, 0, ATTEMPT, 10)
        assert finishing.wait(10)
        abandoning = pool.submit(writer.abandon, [(0, ATTEMPT)], 10)
        with pytest.raises(StageError, match="given up"):
            collecting.result(10)
        may_finish.set()
        abandoning.result(10)
    writer.close()


def test_few_parts_are_finished_at_a_time_however_small_their_last_row_group(tmp_path: Path) -> None:
    store, _, may_finish = standing_still(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record, threads=1)
    first, *_, last = runs.micro_batches(runs.shard(0))
    try:
        with pytest.raises(StoreError, match="Writing fell behind"):
            for shard in range(1000):
                for micro_batch in (first, last):
                    submit(writer, record, replace(micro_batch, shard=shard), timeout_s=0.5)
        assert len(list((tmp_path / "_unfinished").iterdir())) <= 2 * len(record.parts)
    finally:
        may_finish.set()
    writer.close()


def full_disk(failing_write: int) -> Callable[[str], object]:
    lock, writes = threading.Lock(), [0]

    def hook(key: str) -> None:
        with lock:
            writes[0] += 1
            if writes[0] >= failing_write:
                raise StoreError(f"Cannot write {key}: No space left on device.", "The disk is full.")

    return hook


def writes_of_a_shard(folder: Path) -> int:
    writes = []
    store = HookedStore(folder, writes.append)
    runs.write_shard(store, runs.job(store), runs.shard(0), ATTEMPT)
    return len(writes)


def test_a_full_disk_at_any_write_surfaces_and_leaves_nothing(tmp_path: Path) -> None:
    num_writes = writes_of_a_shard(tmp_path / "counted")
    assert num_writes > 15
    for failing_write in range(1, num_writes + 1):
        folder = tmp_path / f"{failing_write}"
        store = HookedStore(folder, full_disk(failing_write))
        record = runs.job(store)
        writer = runs.writer(store, record)
        with pytest.raises(StoreError, match="No space left on device. The disk is full"):
            write_shard_0(writer, record)
        writer.close()
        assert files_below(folder) == [], failing_write
        assert store.late == [], failing_write


def test_a_store_that_refuses_to_write_and_to_delete_is_reported_by_what_it_refused_first(tmp_path: Path, monkeypatch) -> None:
    num_writes = writes_of_a_shard(tmp_path / "counted")

    def refuse(keys: object) -> None:
        raise StoreError("Cannot delete.")

    store = HookedStore(tmp_path / "run", full_disk(num_writes))  # two of three parts are durable by then
    monkeypatch.setattr(store, "delete", refuse)
    record = runs.job(store)
    writer = runs.writer(store, record)
    with pytest.raises(StoreError, match="No space left on device"):
        write_shard_0(writer, record)
    writer.close()


def test_a_failed_write_is_raised_by_the_next_submit_until_the_attempt_is_abandoned(tmp_path: Path) -> None:
    may_fail, disk = threading.Event(), full_disk(1)
    store = HookedStore(tmp_path, lambda key: may_fail.wait(10) and disk(key))
    record = runs.job(store)
    writer = runs.writer(store, record)
    first, second = (runs.micro_batches(runs.shard(index)) for index in (0, 1))
    submit(writer, record, first[0])
    may_fail.set()
    until(lambda: any(opened.failure for opened in writer._attempts.values()))
    for _ in range(2):
        with pytest.raises(StoreError, match="No space left"):
            submit(writer, record, second[0])
    store.hook = lambda _: None
    writer.abandon([(0, ATTEMPT)])
    for micro_batch in second:
        submit(writer, record, micro_batch)
    assert len(writer.collect(1, ATTEMPT, 10)) == 3
    writer.close()
    assert {path.name for path in files_below(tmp_path)} == {f"shard-000001-{ATTEMPT}.parquet"}


def test_room_that_was_taken_as_the_attempt_failed_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the queue is shorter by a layer from then on: at 64 MiB a few such failures would leave none."""
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    take = writer.backlog.take

    def failing(*given: Any) -> bool:
        is_taken = take(*given)
        writer._fail(writer._attempts[0, ATTEMPT], StoreError("gone"))
        return is_taken

    with monkeypatch.context() as patch:
        patch.setattr(writer.backlog, "take", failing)
        with pytest.raises(StoreError, match="gone"):
            submit(writer, record, runs.micro_batches(runs.shard(0))[0])
    writer.abandon([(0, ATTEMPT)])
    until(lambda: writer.backlog.queued_bytes == 0)
    assert files_below(tmp_path) == []
    writer.close()


def test_abandon_deletes_durable_parts_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    for micro_batch in runs.micro_batches(runs.shard(0)):
        submit(writer, record, micro_batch)
    until(lambda: len(list(store.list("data"))) == 3)
    writer.abandon([(0, ATTEMPT), (0, "another")])
    assert files_below(tmp_path) == []
    writer.close()


def test_all_attempts_behind_a_hung_store_are_given_up_by_one_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    store = HookedStore(tmp_path, lambda _: may_write.wait(60))
    record = runs.job(store)
    writer = runs.writer(store, record)
    for index in (0, 1):
        submit(writer, record, runs.micro_batches(runs.shard(index))[0])
    waits: list[float] = []

    def noted(futures: Sequence[Future[None]], timeout_s: float):
        waits.append(timeout_s)
        return wait(futures, timeout_s)

    monkeypatch.setattr("m2ray.activations.writing.writer.wait", noted)
    with pytest.raises(StoreError, match="could not be removed within 0.05 s"):
        writer.abandon([(0, ATTEMPT), (1, ATTEMPT)], 0.05)
    assert waits == [0.05]
    may_write.set()
    writer.close()
    until(lambda: not files_below(tmp_path) and not list((tmp_path / "_unfinished").iterdir()))


def test_close_gives_up_what_is_not_collected(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    submit(writer, record, runs.micro_batches(runs.shard(0))[0])
    writer.close()
    writer.close()
    assert files_below(tmp_path) == []
    with pytest.raises(StageError, match="closed"):
        submit(writer, record, runs.micro_batches(runs.shard(1))[0])


def out_of_order(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batches[1]]


def twice(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batches[0], micro_batches[0]]


def after_the_last(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [*micro_batches, replace(micro_batches[1], index=2)]


def descending(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [replace(micro_batches[0], sequence_ids=micro_batches[0].sequence_ids[::-1])]


def descending_between(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batches[0], replace(micro_batches[1], sequence_ids=micro_batches[0].sequence_ids)]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (out_of_order, "micro-batch 1 came, expected was 0"),
        (twice, "micro-batch 0 came, expected was 1"),
        (after_the_last, "micro-batch 2 came, expected was nothing more"),
        (descending, "sequences of micro-batch 0 do not ascend"),
        (descending_between, "sequences of micro-batch 1 do not ascend"),
    ],
)
def test_rows_out_of_order_are_refused(tmp_path: Path, order, message: str) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    *good, bad = order(runs.micro_batches(runs.shard(0)))
    for micro_batch in good:
        submit(writer, record, micro_batch)
    rows = np.zeros((bad.num_tokens, 2 * runs.WIDTH), np.uint8)
    captured = [CapturedLayer(part.site, part.layer, (rows,)) for part in record.parts]
    with pytest.raises(StageError, match=message):
        writer.submit(ATTEMPT, bad, captured, timeout_s=10)
    writer.close()
    assert files_below(tmp_path) == []


def test_parts_that_come_in_pieces_are_the_same_bytes(tmp_path: Path) -> None:
    """As a wave gives them: layer by layer, over the end of a shard; and a shard is complete when each part is."""
    shards, written = (runs.shard(0), runs.shard(1)), []
    record = runs.job(LocalStore(tmp_path))
    for name in ("whole", "pieces"):
        writer = runs.writer(LocalStore(tmp_path / name), record)
        batches = [micro_batch for shard in shards for micro_batch in runs.micro_batches(shard)]
        groups = [record.parts] if name == "whole" else [record.parts[:2], (), record.parts[2:], ()]
        for number, parts in enumerate(groups):
            for micro_batch in batches:
                writer.submit(ATTEMPT, micro_batch, runs.captured(parts, micro_batch), 10)
            if number < len(groups) - 2:
                with pytest.raises(StageError, match="before its last micro-batch"):
                    writer.collect(0, ATTEMPT, 10)
        receipts = [writer.collect(shard.index, ATTEMPT, 10) for shard in shards]
        writer.close()
        written.append((receipts, {key.relative_to(tmp_path / name): key.read_bytes() for key in (tmp_path / name).rglob("*.parquet")}))
    assert written[0] == written[1]


def part_writers(folder: Path, count: int) -> list[PartWriter]:
    return [PartWriter(LocalStore(folder), PartSpec.of("residual", layer, "bfloat16", 4), {}, 0, ATTEMPT) for layer in range(count)]


def test_no_thread_is_idle_while_a_part_has_work_and_each_parts_is_done_in_its_order(tmp_path: Path) -> None:
    """A thread with parts of its own had its last rows behind those of others, while other threads had none."""
    queues, may_end, done = PartQueues(2), threading.Event(), list[tuple[int, int]]()
    slow, *quick = part_writers(tmp_path, 4)
    standing = queues.submit(slow, lambda: may_end.wait(20) and done.append((0, 0)))
    last = queues.submit(slow, done.append, (0, 1))
    for number in range(3):
        wait([queues.submit(part, done.append, (layer, number)) for layer, part in enumerate(quick, 1)], 20)
    assert sorted(done) == [(layer, number) for layer in (1, 2, 3) for number in range(3)]
    assert [[number for layer, number in done if layer == of] for of in (1, 2, 3)] == [[0, 1, 2]] * 3
    failing = queues.submit(slow, lambda: 1 // 0)
    late = queues.submit(slow, done.append, (0, 2))
    queues.threads.shutdown(wait=False)
    may_end.set()
    assert wait([standing, last, failing, late], 20).not_done == set(), "what came before the threads were ended is done"
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert done[9:] == [(0, 0), (0, 1), (0, 2)]


def test_what_came_first_is_done_first_whichever_part_it_is_of(tmp_path: Path) -> None:
    """So a shard's parts end before those of later ones begin, and few are open at a time."""
    queues, may_end, done = PartQueues(1), threading.Event(), list[tuple[int, int]]()
    parts = part_writers(tmp_path, 3)
    work = [queues.submit(parts[0], may_end.wait, 20)]
    work += [queues.submit(parts[layer], done.append, (layer, number)) for layer in (1, 2) for number in range(3)]
    may_end.set()
    wait(work, 20)
    assert done == [(layer, number) for layer in (1, 2) for number in range(3)]
    queues.threads.shutdown()


def test_a_piece_whose_part_lacks_the_one_before_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    first, second = runs.micro_batches(runs.shard(0))
    writer.submit(ATTEMPT, first, runs.captured(record.parts[:1], first), 10)
    writer.submit(ATTEMPT, second, runs.captured(record.parts[:1], second), 10)
    with pytest.raises(StageError, match="micro-batch 1 came, expected was 0"):
        writer.submit(ATTEMPT, second, runs.captured(record.parts[1:], second), 10)
    with pytest.raises(StageError, match="micro-batch 0 came, expected was nothing more"):
        writer.submit(ATTEMPT, first, runs.captured(record.parts[:1], first), 10)
    writer.close()
    assert files_below(tmp_path) == []


def test_other_captures_than_agreed_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = runs.job(store)
    writer = runs.writer(store, record)
    micro_batch = runs.micro_batches(runs.shard(0))[0]
    good = runs.captured(record.parts, micro_batch)
    foreign = runs.captured([PartSpec.of("residual", 8, "bfloat16", runs.WIDTH)], micro_batch)
    for bad in ([*good, good[0]], [*good[1:], *foreign]):
        with pytest.raises(StageError, match="captured"):
            writer.submit(ATTEMPT, micro_batch, bad, timeout_s=10)
    with pytest.raises(StageError, match=rf"uint8 \[{micro_batch.num_tokens - 1}, 48\], not as uint8 \[{micro_batch.num_tokens}, 48\]"):
        writer.submit(ATTEMPT, micro_batch, [replace(layer, columns=(layer.columns[0][1:],)) for layer in good], timeout_s=10)
    with pytest.raises(StageError, match="other CRCs than one a row and column"):
        writer.submit(ATTEMPT, micro_batch, [replace(layer, crcs=(np.zeros(3, np.uint32),)) for layer in good], timeout_s=10)
    with pytest.raises(StageError, match="before its last micro-batch"):
        writer.collect(0, ATTEMPT, 10)
    writer.close()
