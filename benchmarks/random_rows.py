"""256 random rows of a layer: `.rows(indices)` against pyarrow's dataset.take on the same files, both with files in the page cache.

python benchmarks/random_rows.py [--shards 8] [--check none]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds

import m2ray
from benchmarks.records import Row, record
from benchmarks.synthetic import HIDDEN_SIZE, LAYER, make_run
from m2ray.activations.reading.part_reader import Check
from m2ray.activations.schema import Compression

ROWS = 256


def seconds(read: Callable[[npt.NDArray[np.int64]], object], numbers: npt.NDArray[np.int64]) -> float:
    begin = time.perf_counter()
    read(numbers)
    return time.perf_counter() - begin


def measure(folder: Path, shards: int, compression: Compression, check: Check, repeats: int) -> Row:
    make_run(folder, shards, compression)
    view = m2ray.open_run(folder, check=check).site("residual").layer(LAYER)
    files = sorted((folder / "data").rglob("*.parquet"))
    dataset = ds.dataset(files)
    columns = ["activation_hi", "activation_lo"] if compression == "planes" else ["activation"]
    draws = [np.random.default_rng(number).integers(0, view.num_tokens, ROWS) for number in range(repeats)]
    bits = view.rows(draws[0])
    assert tuple(bits.shape) == (ROWS, HIDDEN_SIZE)
    taken = dataset.take(draws[0], columns=columns)
    assert len(taken) == ROWS
    ours = statistics.median(seconds(view.rows, draw) for draw in draws[1:])
    theirs = statistics.median(seconds(partial(dataset.take, columns=columns), draw) for draw in draws[1:])
    note = f"{shards} files, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB; median of {repeats - 1} draws"
    name = f'256 random rows, compression = "{compression}"{"" if check == "pages" else ", unchecked"}'
    return Row(
        name, ROWS / ours, "rows/s", ROWS / theirs, "pyarrow dataset.take", theirs / ours, "20" if compression == "none" else "", note
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--check", choices=get_args(Check), default="pages")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    rows = []
    for compression in ("none", "planes"):
        with TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), options.shards, compression, options.check, options.repeats))
    record("random_rows", "Random rows", rows)


if __name__ == "__main__":
    main()
