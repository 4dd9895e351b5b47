"""The writer against the same bytes written as plainly as can be: to the local disk, and to an S3 server with the same client.

    python -m benchmarks.writer_speed --folder /path/on/the/disk --url s3://bucket/folder

Endpoint and credentials come from the environment, as for m2ray itself: `scripts/s3_server up FOLDER` prints them.

Each pair is measured one right after the other, in alternating order; a ratio is the median over the pairs. Local writes end
with an fsync of the file and its folder on both sides. On one core: the process is pinned to it, server and disk are not.
"""

import argparse
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import obstore

from benchmarks.records import Row, record
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartSpec
from m2ray.storage import ObjectStore, Store, open_store

HIDDEN_SIZE = 3072
SEQUENCES, LENGTH = 32, 512
MICRO_BATCHES = 2
"""Of 16,384 tokens each: a shard at the defaults, 201 MB a layer in bfloat16."""


def micro_batches() -> list[MicroBatch]:
    counts = np.full(SEQUENCES, LENGTH, np.int32)
    token_ids_BT = np.random.default_rng(0).integers(0, 200_000, (SEQUENCES, LENGTH), dtype=np.int32)
    first = (np.arange(SEQUENCES) + number * SEQUENCES for number in range(MICRO_BATCHES))
    return [MicroBatch(0, number, number == MICRO_BATCHES - 1, ids, counts, token_ids_BT) for number, ids in enumerate(first)]


def activations() -> Bits:
    """One micro-batch of one layer: bfloat16 bits of Gaussian numbers on channels of different scale, uint8 [N, 2 * H]."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((SEQUENCES * LENGTH, HIDDEN_SIZE), dtype=np.float32)
    values *= np.exp(rng.standard_normal(HIDDEN_SIZE, dtype=np.float32))
    return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)


Seconds = tuple[float, float]
"""By the clock, and of the processor."""


def clock() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(begin: Seconds) -> Seconds:
    now = clock()
    return now[0] - begin[0], now[1] - begin[1]


def write_parts(store: Store, rows: Bits, layers: int, threads: int) -> Seconds:
    """Seconds that ActivationWriter takes for one shard of so many layers, from the first submit to the last receipt."""
    parts = [PartSpec.of("residual", layer, "bfloat16", HIDDEN_SIZE) for layer in range(layers)]
    captured = [CapturedLayer("residual", layer, (rows,)) for layer in range(layers)]
    attempt = uuid.uuid4().hex[:12]
    writer = ActivationWriter(store, {}, parts, queue_bytes=2 << 30, threads=threads)
    try:
        begin = clock()
        for micro_batch in micro_batches():
            writer.submit(attempt, micro_batch, captured, 600)
        receipts = writer.collect(0, attempt, 600)
        seconds = since(begin)
    finally:
        writer.close()
    store.delete([receipt.key for receipt in receipts])
    return seconds


def write_plainly(folder: Path, rows: Bits, layers: int, threads: int = 1) -> Seconds:
    """Seconds for the same rows in as many files: write(), fsync of file and folder."""

    def write(path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for _ in range(MICRO_BATCHES):
            view = rows.reshape(-1).data
            while len(view):
                view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)
        folder_fd = os.open(folder, os.O_RDONLY)
        os.fsync(folder_fd)
        os.close(folder_fd)

    begin, paths = clock(), [folder / uuid.uuid4().hex for _ in range(layers)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, paths))
    seconds = since(begin)
    for path in paths:
        path.unlink()
    return seconds


def put_plainly(store: ObjectStore, rows: Bits, layers: int) -> Seconds:
    """Seconds for the same rows in as many objects: obstore.put, multipart as obstore itself chooses."""
    body = rows.tobytes() * MICRO_BATCHES
    keys = [uuid.uuid4().hex for _ in range(layers)]
    begin = clock()
    for key in keys:
        obstore.put(store._store, key, body)  # noqa: SLF001 - the same client on purpose
    seconds = since(begin)
    store.delete(keys)
    return seconds


@dataclass(frozen=True)
class Measured:
    """One entry a pair."""

    ours: list[Seconds]
    theirs: list[Seconds]


def in_pairs(ours: Callable[[], Seconds], theirs: Callable[[], Seconds], pairs: int) -> Measured:
    """Each right after the other, in alternating order; the first pair only warms up."""
    ours(), theirs()
    found = Measured([], [])
    for number in range(pairs):
        sides = [(found.ours, ours), (found.theirs, theirs)]
        for taken, work in sides if number % 2 else reversed(sides):
            taken.append(work())
    return found


def row(what: str, rows: Bits, layers: int, measured: Measured, baseline_is: str, target: str) -> Row:
    gigabytes = rows.nbytes * MICRO_BATCHES * layers / 1e9
    (ours_s, ours_core_s), (plain_s, plain_core_s) = (
        [statistics.median(pair[kind] for pair in side) / gigabytes for kind in (0, 1)] for side in (measured.ours, measured.theirs)
    )
    ratios = [plain / ours for (ours, _), (plain, _) in zip(measured.ours, measured.theirs, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    note = (
        f"median of {len(ratios)} pairs, quartiles {low:.2f} to {high:.2f}; {gigabytes:.2f} GB each;"
        f" core-seconds a GB: {ours_core_s:.2f}, the baseline {plain_core_s:.2f}; load of the machine {os.getloadavg()[1]:.0f}"
    )
    return Row(what, 1 / ours_s, "GB/s", 1 / plain_s, baseline_is, ratio, target, note)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder below `folder`, deleted after."""
    with TemporaryDirectory(prefix="writer-speed-", dir=folder) as path:
        yield Path(path)


def local_rows(folder: Path, rows: Bits, layers: int, pairs: int) -> list[Row]:
    with scratch(folder) as path:
        store = open_store(path)
        measured = in_pairs(lambda: write_parts(store, rows, layers, 1), lambda: write_plainly(path, rows, layers), pairs)
    return [row("ActivationWriter, 1 thread on 1 core, local disk", rows, layers, measured, "write() and fsync", "0.7")]


def object_rows(url: str, rows: Bits, layers: int, pairs: int) -> list[Row]:
    store = ObjectStore(f"{url}/writer-speed-{uuid.uuid4().hex[:8]}")
    measured = in_pairs(lambda: write_parts(store, rows, layers, 1), lambda: put_plainly(store, rows, layers), pairs)
    return [row("ActivationWriter, 1 thread, S3 server on loopback", rows, layers, measured, "obstore.put", "0.8")]


def thread_rows(store: Store, where: str, rows: Bits, pairs: int) -> list[Row]:
    """2, 4, 8 and 16 threads, as there are cores, against one thread; on a disk also against write() in as many threads."""
    found = []
    for threads in [count for count in (2, 4, 8, 16) if count <= len(os.sched_getaffinity(0))]:
        layers = max(4, threads)
        ours = partial(write_parts, store, rows, layers, threads)
        measured = in_pairs(ours, partial(write_parts, store, rows, layers, 1), pairs)
        found.append(row(f"ActivationWriter, {threads} threads, {where}", rows, layers, measured, "1 thread", ""))
        if store.folder:
            measured = in_pairs(ours, partial(write_plainly, store.folder, rows, layers, threads), pairs)
            found.append(
                row(f"ActivationWriter, {threads} threads, {where}", rows, layers, measured, f"write() and fsync, {threads} threads", "")
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the local disk to measure")
    parser.add_argument("--url", help="folder in a bucket to measure; endpoint and credentials from the environment")
    parser.add_argument("--layers", type=int, default=2, help="files a shard, of 201 MB each")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--no-record", action="store_true", help="print the rows only")
    options = parser.parse_args()
    rows = activations()
    cores = os.sched_getaffinity(0)
    found: list[Row] = []
    if options.folder:
        os.sched_setaffinity(0, {max(cores)})
        found += local_rows(options.folder, rows, options.layers, options.pairs)
        os.sched_setaffinity(0, cores)
        with scratch(options.folder) as folder:
            found += thread_rows(open_store(folder), "local disk", rows, options.pairs)
    if options.url:
        found += object_rows(options.url, rows, options.layers, options.pairs)
        found += thread_rows(open_store(f"{options.url}/writer-speed-{uuid.uuid4().hex[:8]}"), "S3 server on loopback", rows, options.pairs)
    if options.no_record:
        for each in found:
            print(each)
    else:
        record("writer_speed", "Writing parts", found)


if __name__ == "__main__":
    main()
