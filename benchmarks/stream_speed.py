"""An epoch of `.stream()` against reading the same files as plainly as can be, both with files in the page cache.

    python -m benchmarks.stream_speed [--shards 8]

Epochs of one stream, as in training. Its first one also has the kernel give out the memory of the shuffle buffer, and is told apart.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import m2ray
from benchmarks.records import Row, record
from benchmarks.synthetic import HIDDEN_SIZE, LAYER, make_run
from m2ray.activations.schema import Compression
from m2ray.activations.stream import ActivationStream


def read_plainly(files: list[Path]) -> float:
    """Seconds for all bytes, read() into one buffer of 8 MiB."""
    buffer, begin = bytearray(8 << 20), time.perf_counter()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
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


def measure(folder: Path, shards: int, compression: Compression, pairs: int) -> Row:
    make_run(folder, shards, compression)
    files = sorted((folder / "data").rglob("*.parquet"))
    rows = m2ray.open_run(folder).num_tokens
    gigabytes = rows * HIDDEN_SIZE * 2 / 1e9
    stream = m2ray.open_run(folder).site("residual").layer(LAYER).stream(batch_rows=4096, shuffle_buffer_bytes=512 << 20)
    first_plain_s, first_s = read_plainly(files), read_stream(stream, 0, rows)
    taken = [(read_plainly(files), read_stream(stream, pair + 1, rows)) for pair in range(pairs)]
    plain_s, ours_s = (statistics.median(pair[side] for pair in taken) for side in (0, 1))
    ratios = [plain / ours for plain, ours in taken]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    note = (
        f"{gigabytes:.2f} GB of rows in {sum(file.stat().st_size for file in files) / 1e9:.2f} GB of files; median of {pairs} pairs, "
        f"quartiles {low:.2f} to {high:.2f}; the first epoch {first_plain_s / first_s:.2f}; 4 reading threads, the baseline has 1; "
        f"load of the machine {os.getloadavg()[1]:.0f}"
    )
    name = f'stream, 512 MiB shuffle buffer, compression = "{compression}"'
    baseline = "read() of the same files" if compression == "none" else "read() of the same files, as GB of rows"
    return Row(name, gigabytes / ours_s, "GB/s", gigabytes / plain_s, baseline, ratio, "0.5" if compression == "none" else "", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for compression in ("none", "planes"):
        with TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), options.shards, compression, options.pairs))
    record("stream_speed", "Streaming a layer", rows)


if __name__ == "__main__":
    main()
