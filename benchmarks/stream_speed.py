"""An epoch of `.stream()` against reading the same files as plainly as can be, both with files in the page cache.

    python -m benchmarks.stream_speed [--shards 8]

Two plain readings: into one buffer of 1 MiB, which stays in the processor's cache, and into memory as large as what the stream fills at
a time, which does not. Epochs of one stream, as in training. Its first one also has the kernel give out the memory of the shuffle buffer.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import m2ray
from benchmarks.records import Row, record
from benchmarks.synthetic import HIDDEN_SIZE, LAYER, make_run
from m2ray.activations.reading.stream import READS_AT_ONCE, ActivationStream
from m2ray.activations.schema import Compression

READ_BYTES = 1 << 20
PAGE_BYTES = 4096
BUFFER_BYTES = 512 << 20


def aligned(num_bytes: int) -> memoryview:
    """Memory that begins at a page: to odd addresses the kernel copies half as fast."""
    memory = np.empty(num_bytes + PAGE_BYTES, np.uint8)
    begin = -memory.ctypes.data % PAGE_BYTES
    return memory[begin : begin + num_bytes].data


def read_plainly(files: list[Path], memory: memoryview) -> float:
    """Seconds for all bytes, read() by 1 MiB through `memory` over and over."""
    begin, at = time.perf_counter(), 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        while os.readv(fd, [memory[at : at + READ_BYTES]]):
            at = (at + READ_BYTES) % len(memory)
        os.close(fd)
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


def measure(folder: Path, shards: int, compression: Compression, pairs: int) -> list[Row]:
    make_run(folder, shards, compression)
    files = sorted((folder / "data").rglob("*.parquet"))
    rows = m2ray.open_run(folder).num_tokens
    gigabytes = rows * HIDDEN_SIZE * 2 / 1e9
    stream = m2ray.open_run(folder).site("residual").layer(LAYER).stream(batch_rows=4096, shuffle_buffer_bytes=BUFFER_BYTES)
    cached, large = (aligned(num_bytes) for num_bytes in (READ_BYTES, BUFFER_BYTES // 2))
    first_s = read_stream(stream, 0, rows)
    taken = [(read_plainly(files, cached), read_plainly(files, large), read_stream(stream, pair + 1, rows)) for pair in range(pairs)]
    ours_s = statistics.median(ours for _, _, ours in taken)
    note = (
        f"{gigabytes:.2f} GB of rows in {sum(file.stat().st_size for file in files) / 1e9:.2f} GB of files; median of {pairs} pairs, "
        f"quartiles {{:.2f}} to {{:.2f}}; the first epoch {gigabytes / first_s:.1f} GB/s; {READS_AT_ONCE} reading threads, the baseline has 1; "
        f"load of the machine {os.getloadavg()[1]:.0f}"
    )
    measured = []
    for side, where in enumerate(("one buffer of 1 MiB", "memory as large as the stream's window")):
        plain_s = statistics.median(pair[side] for pair in taken)
        low, ratio, high = statistics.quantiles((pair[side] / pair[2] for pair in taken), n=4)
        name = f'stream, 512 MiB shuffle buffer, compression = "{compression}"'
        baseline = f"read() of the same files into {where}" + ("" if compression == "none" else ", as GB of rows")
        target = "0.5" if compression == "none" else ""
        measured.append(Row(name, gigabytes / ours_s, "GB/s", gigabytes / plain_s, baseline, ratio, target, note.format(low, high)))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    rows: list[Row] = []
    for compression in ("none", "planes"):
        with TemporaryDirectory() as folder:
            rows += measure(Path(folder), options.shards, compression, options.pairs)
    record("stream_speed", "Streaming a layer", rows)


if __name__ == "__main__":
    main()
