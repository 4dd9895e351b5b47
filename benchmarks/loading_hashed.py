"""Loading onto a GPU with the weights' digests and without, taking turns in one process: from the page cache, and cold.

python -m benchmarks.loading_hashed FOLDER

Needs what benchmarks.gpu_stage needs, and root to empty the page cache.
"""

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.gpu_stage import drop_caches, load_rate, raw_rate, require_root, span_ranges
from benchmarks.records import Row, record
from m2ray.model import gpu_loading
from m2ray.model.digests import WeightDigests

WAYS = ("nothing", "by the GPU", "by the lanes")
TURNS = {"from the page cache": (8, WAYS), "from the disk": (3, WAYS[:2])}
"""How often, and which ways: a disk is slower than the lanes hash."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    require_root()
    model = real_size(arguments.folder, arguments.layers)
    ranges = span_ranges(model, arguments.layers)
    torch.zeros(1, device="cuda")
    raw_rate(ranges, 16)  # into the page cache
    for way in WAYS:
        rate(way, model, arguments.layers)  # kernels are compiled, memory is pinned
    rows: list[Row] = []
    for state in TURNS:
        rows += measured(state, model, arguments.layers)
        # After each: a machine's time may end before the other has run.
        record(
            "gpu_loading_hashed", f"Loading {arguments.layers} layers at MiniMax-M2's real dimensions, hashed and not, taking turns", rows
        )


def measured(state: str, model: Path, layers: int) -> Iterator[Row]:
    repeats, ways = TURNS[state]
    found = {way: list[float]() for way in ways}
    for _ in range(repeats):
        for way in ways:
            if state == "from the disk":
                drop_caches()
            found[way].append(rate(way, model, layers))
            print(f"{state}, hashed {way}: {found[way][-1]:.2f} GB/s", flush=True)
    plain = statistics.median(found["nothing"])
    plain_read = f"; plain pread by 16 threads {raw_rate(span_ranges(model, layers), 16):.1f} GB/s" if state != "from the disk" else ""
    for way in ways[1:]:
        median = statistics.median(found[way])
        rounds = " against ".join(", ".join(f"{each:.1f}" for each in found[each_way]) for each_way in (way, "nothing"))
        note = f"medians of {repeats}; rounds {rounds}; {os.cpu_count()} cores{plain_read}"
        target = "0.97" if way == "by the GPU" else ""
        yield Row(f"{state}, hashed {way}", median, "GB/s", plain, "the same without hashing", median / plain, target, note)


def rate(way: str, model: Path, layers: int) -> float:
    """GB/s of load_stage in one of WAYS."""
    with ExitStack() as changed:
        if way != "by the GPU":
            changed.enter_context(patch.object(gpu_loading, "can_hash", lambda _: False))
        if way == "nothing":
            changed.enter_context(patch.object(WeightDigests, "add", lambda *_: None))
            changed.enter_context(patch.object(WeightDigests, "by_layer", lambda _: {}))
        return load_rate(model, layers)


if __name__ == "__main__":
    main()
