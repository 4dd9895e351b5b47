"""An epoch of `.stream()`, checked and unchecked, against reading the same files as plainly as can be.

    python -m benchmarks.stream_speed [--shards 8]
    python -m benchmarks.stream_speed --url s3://bucket/folder

On a disk, with files in the page cache, there are two plain readings: into one buffer of 1 MiB, which stays in the processor's cache, and into
memory as large as what the stream fills at a time, which does not. From a server the plain reading is the client's own ranged gets, as
many at once and as long as the stream's, whose bytes nobody looks at. Epochs of one stream, as in training. Its first one also has the kernel
give out the memory of the shuffle buffer.

Checked pages are read into the processor's cache, hashed there and laid where they belong: a second copy. The hash itself takes 14 ms of
processor time a GB. On the 2 cores of 29 November 2026, at load 4, one thread did read and copy at 3.3 GB/s and two threads at 3.1, without
any hash or Python between: there more threads do not help. Whether memory or the machine's other load is why was not told apart.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import m2ray
from benchmarks.records import Row, record
from benchmarks.synthetic import HIDDEN_SIZE, LAYER, make_run
from m2ray.activations.reading.part_reader import Check
from m2ray.activations.reading.stream import ActivationStream
from m2ray.activations.reading.windows import READS_AT_ONCE, REMOTE_READS_AT_ONCE
from m2ray.activations.schema import Compression
from m2ray.storage import ObjectStore, Store, aligned, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 1 << 20
GET_BYTES = 4 << 20
BUFFER_BYTES = 1 << 30


def read_plainly(files: list[Path], memory: memoryview) -> float:
    """Seconds for all bytes, read() by 1 MiB through `memory` over and over."""
    begin, at = time.perf_counter(), 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        while os.readv(fd, [memory[at : at + READ_BYTES]]):
            at = (at + READ_BYTES) % len(memory)
        os.close(fd)
    return time.perf_counter() - begin


def get_plainly(store: Any, files: list[tuple[str, int]]) -> float:
    """Seconds for all bytes by obstore's own get_range."""
    import obstore

    ranges = [(key, start, min(GET_BYTES, size - start)) for key, size in files for start in range(0, size, GET_BYTES)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(REMOTE_READS_AT_ONCE) as pool:
        found = sum(pool.map(lambda of: len(obstore.get_range(store._store, of[0], start=of[1], length=of[2])), ranges))  # noqa: SLF001
    assert found == sum(size for _, size in files)
    return time.perf_counter() - begin


def read_stream(stream: ActivationStream, epoch: int, rows: int) -> float:
    """Seconds for an epoch, from its first row to its last batch."""
    begin, found = time.perf_counter(), 0
    stream.set_epoch(epoch)
    for batch in stream:
        found += len(batch["activations"])
    taken = time.perf_counter() - begin
    assert found == rows
    return taken


def open_stream(store: Store, check: Check) -> ActivationStream:
    return m2ray.open_run(store.url, check=check).layer(LAYER).stream(batch_rows=4096, shuffle_buffer_bytes=BUFFER_BYTES)


def measure(store: Store, shards: int, compression: Compression, pairs: int) -> list[Row]:
    make_run(store.url, shards, compression)
    files = sorted(store.list("data"))
    rows = m2ray.open_run(store.url).num_tokens
    gigabytes = rows * HIDDEN_SIZE * 2 / 1e9
    stream, unchecked = open_stream(store, "pages"), open_stream(store, "none")
    first_s = read_stream(stream, 0, rows)
    sides: dict[str, Callable[[int], float]] = {}
    if store.folder is None:
        assert isinstance(store, ObjectStore)
        sides["the client's own ranged gets of the same files"] = lambda _: get_plainly(store, files)
    else:
        paths, memory = [store.folder / key for key, _ in files], (aligned(READ_BYTES), aligned(BUFFER_BYTES // 2))
        sides["read() of the same files into one buffer of 1 MiB"] = lambda _: read_plainly(paths, memory[0])
        sides["read() of the same files into memory as large as the stream's window"] = lambda _: read_plainly(paths, memory[1])
    sides["the same stream unchecked"] = lambda epoch: read_stream(unchecked, epoch, rows)
    taken = [{name: side(pair + 1) for name, side in sides.items()} | {"": read_stream(stream, pair + 1, rows)} for pair in range(pairs)]
    ours_s = statistics.median(pair[""] for pair in taken)
    at_once = READS_AT_ONCE if store.folder else REMOTE_READS_AT_ONCE
    note = (
        f"{gigabytes:.2f} GB of rows in {sum(size for _, size in files) / 1e9:.2f} GB of files; median of {pairs} pairs, "
        f"quartiles {{:.2f}} to {{:.2f}}; the first epoch {gigabytes / first_s:.1f} GB/s; {at_once} reading threads; "
        f"load of the machine {os.getloadavg()[1]:.0f}"
    )
    targets = (
        {"the client": "0.8", "read() of the same files into memory": "0.8", "the same stream": "0.9"} if compression == "none" else {}
    )
    measured = []
    for name in sides:
        low, ratio, high = statistics.quantiles((pair[name] / pair[""] for pair in taken), n=4)
        what = f'stream, 1 GiB shuffle buffer, compression = "{compression}"' + ("" if store.folder else ", S3 server on loopback")
        baseline = name + ("" if compression == "none" else ", as GB of rows")
        target = next((target for words, target in targets.items() if name.startswith(words)), "")
        plain = gigabytes / statistics.median(pair[name] for pair in taken)
        measured.append(Row(what, gigabytes / ours_s, "GB/s", plain, baseline, ratio, target, note.format(low, high)))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--url", help="a folder of a bucket, in place of a temporary folder on this disk")
    options = parser.parse_args()
    if options.url:
        record(
            "stream_speed_s3", "Streaming a layer from a server", measure(open_store(options.url), options.shards, "none", options.pairs)
        )
        return
    rows: list[Row] = []
    for compression in ("none", "planes"):
        with TemporaryDirectory() as folder:
            rows += measure(open_store(folder), options.shards, compression, options.pairs)
    record("stream_speed", "Streaming a layer", rows)


if __name__ == "__main__":
    main()
