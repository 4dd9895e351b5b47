"""How fast a CPU unpacks each quantised layout, beside a copy of as many bytes as come out.

python -m benchmarks.unpacking [--pieces 8]

Codes and scales are drawn at random, but for FP8, whose values are spread as those of trained weights are: a normal distribution to 448. Where all of
its codes are as frequent one in twenty is subnormal, and unpacking goes another way, which a row of its own is about.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.records import Row, record
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.filling import fill
from m2ray.model.openmp import lone_threads
from m2ray.model.pieces import cut
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.quantization.stored import StoredTensor
from m2ray.model.weights import THREADS
from scripts.checkpoint_formats.table import FORMATS
from scripts.make_checkpoint import make_checkpoint
from tests.reference import DATA

SIZES = {
    "layers": 1,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "vocab_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
REPEATS = 7
TARGET = 0.5


def measure(pieces: int) -> list[Row]:
    """A row for each format: bytes of bfloat16 a second, of `pieces` weights of 4096 x 2048 on as many threads as loading has."""
    config = json.loads((DATA / "families" / "llama.json").read_text())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for fmt in sorted(FORMATS.keys() - {"mxfp4", "nvfp4-hf-quant"}):
            out = Path(folder) / fmt
            make_checkpoint(out, config, overrides=SIZES, fmt=fmt, seed=1)
            checkpoint = open_checkpoint(str(out))
            stored = layout_of(checkpoint.whole_config).stored(checkpoint.headers)["model.layers.0.mlp.up_proj.weight"]
            parts = {part.name: checkpoint.read(part.key) for part in stored.parts}
            if fmt == "fp8-ue8m0":
                rows.append(_row(fmt, stored, parts, pieces, ", all codes as frequent"))
            if parts["values"].dtype == torch.float8_e4m3fn:
                trained = torch.randn(stored.shape, generator=torch.Generator().manual_seed(1)) * 100
                parts["values"] = trained.clamp(-448, 448).to(torch.float8_e4m3fn)
            rows.append(_row(fmt, stored, parts, pieces))
    return rows


def _row(fmt: str, stored: StoredTensor, parts: dict[str, torch.Tensor], pieces: int, kind: str = "") -> Row:
    weights = [torch.zeros(stored.shape, dtype=torch.bfloat16) for _ in range(pieces)]
    source = torch.ones(stored.shape, dtype=torch.bfloat16)
    num_bytes = pieces * source.nbytes

    def unpack(into: torch.Tensor) -> None:
        (wanted,) = cut(stored, None, into)
        fill(wanted, parts)

    def copy(into: torch.Tensor) -> None:
        into.copy_(source)

    copied, unpacked = _bytes_per_s((copy, unpack), weights, num_bytes)
    note = f"a copy of as many bytes, alternating: {copied:.1f} GB/s"
    return Row(
        f"{fmt}: {stored.method}{kind}",  # several formats are one method
        unpacked,
        "GB/s of bfloat16",
        copied,
        "a memory copy by as many threads:",
        unpacked / copied,
        f"{TARGET}",
        note,
    )


def _bytes_per_s(tasks: tuple[Callable[[torch.Tensor], None], ...], weights: list[torch.Tensor], num_bytes: int) -> list[float]:
    """Of each task, in turns: the median in 10^9 bytes a second."""
    times_s: list[list[float]] = [[] for _ in tasks]
    with lone_threads(THREADS, "unpack") as pool:
        for _ in range(REPEATS):
            for task, times in zip(tasks, times_s, strict=True):
                begin = time.perf_counter()
                list(pool.map(task, weights))
                times.append(time.perf_counter() - begin)
    return [num_bytes / statistics.median(times) / 1e9 for times in times_s]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=8)
    record("unpacking", "Quantised layouts unpacked on a CPU", measure(parser.parse_args().pieces))
