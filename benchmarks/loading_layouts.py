"""Quantised layouts onto a GPU, at MiniMax-M2's real widths (MXFP4 at gpt-oss-120b's): how fast each loads, and how fast its kernel unpacks.

    python -m benchmarks.loading_layouts kernels                  the kernels alone: weights of a layer's experts, on the GPU already
    python -m benchmarks.loading_layouts loading FOLDER [NAMES]   load_stage of some 3.7 GB of each format, alternating with FP8 in blocks

Needs a GPU with 40 GB; `loading` 9 GB of FOLDER (memory: /dev/shm), where each format is made, loaded and deleted. `--tiny` is for a try on a CPU.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch

from benchmarks.checkpoints import free
from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.quantization import fused, mxfp4, nvfp4
from m2ray.model.quantization.awq import Awq
from m2ray.model.quantization.fused_proof import is_exact
from m2ray.model.quantization.gptq import Gptq
from m2ray.model.quantization.pack_quantized import PackQuantized
from m2ray.model.quantization.packed import Packed
from m2ray.model.quantization.scaling import ScaledUnpack
from m2ray.model.quantization.stored import Unpack
from m2ray.model.stage import StageSpec, load_stage
from scripts.checkpoint_formats.table import FORMATS
from scripts.make_checkpoint import make_checkpoint
from tests.reference import DATA

VOCABULARY = {"vocab_size": 512}
GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_heads": 64, "num_kv_heads": 8, "num_experts": 128}
TINY = {
    "experts_per_token": 2,
    "hidden_size": 256,
    "intermediate_size": 128,
    "head_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 4,
    "vocab_size": 512,
}
OF_8_BITS = (
    "fp8",
    "fp8-static",
    "fp8-ue8m0",
    "mxfp8",
    "float-quantized",
    "float-quantized-tensor",
    "float-quantized-block",
    "int-quantized",
    "modelopt-fp8",
)
BASE = "fp8"
LOADS, LAUNCHES = 3, 10
EXPERTS, SHAPES = 256, ((1536, 3072), (1536, 3072), (3072, 1536))
"""Of a layer of MiniMax-M2: an expert's matrices, of which the first two are stacked."""
EXTENT_MATRICES = 7
"""Of 8 bits in one extent."""
TARGET_MS = 3.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("kernels", "loading"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FORMATS)}; all without")
    parser.add_argument("--size", nargs=2, type=int, action="append", default=[], metavar=("CHUNKS", "WARPS"), help="of a program, to try")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    size = "tiny" if options.tiny else "at MiniMax-M2's real widths"
    if options.half == "kernels":
        record(
            "unpacking_on_gpu",
            f"Quantised experts of a layer unpacked on a GPU, {size}",
            kernels(2 if options.tiny else EXPERTS, options.size),
        )
        return
    if options.folder is None:
        parser.error("loading needs FOLDER")
    names = options.names or sorted(FORMATS.keys() - {"nvfp4-hf-quant"})
    rows: list[Row] = []
    with_base = make(options.folder, BASE, tiny=options.tiny)
    for name in names:
        rows.append(loading(with_base, make(options.folder, name, tiny=options.tiny), name))
        record("loading_layouts", f"Quantised layouts loaded, {size}", rows)
    shutil.rmtree(with_base)


# -- loading --------------------------------------------------------------------------------------------------------------


def make(folder: Path, fmt: str, *, tiny: bool) -> Path:
    """A checkpoint of one layer, of two where values have 4 bits: about as many bytes of each format."""
    path = DATA / "families/gpt_oss.json" if fmt == "mxfp4" else DATA / "minimax_m2/config.json"
    overrides = {**(TINY if tiny else GPT_OSS if fmt == "mxfp4" else {}), **VOCABULARY, "layers": 1 if fmt in OF_8_BITS else 2}
    out, processes = folder.resolve() / fmt, 1 if tiny else min(16, os.cpu_count() or 1)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    config = json.loads(path.read_text())
    make_checkpoint(out, config, processes=processes, overrides=overrides, fmt=fmt, seed=1, max_shard_bytes=250_000_000)
    print(f"{fmt} made in {time.monotonic() - began:.1f} s", flush=True)
    return out


def loading(base: Path, model: Path, name: str) -> Row:
    """Loads of one format and of FP8 in blocks, alternating, after one of each; the first is deleted then."""
    rates: dict[Path, list[float]] = {base: [], model: []}
    for _ in range(1 + LOADS):
        for folder, found in rates.items():
            found.append(load_rate(folder))
    shutil.rmtree(model)
    of_base, rate = (statistics.median(found[1:]) for found in rates.values())
    note = f"medians of {LOADS}; {min(rates[model][1:]):.1f} to {max(rates[model][1:]):.1f}, the first {rates[model][0]:.1f}"
    return Row(name, rate, "GB/s of file bytes", of_base, "FP8 in blocks of 128 x 128, alternating:", rate / of_base, "0.8", note)


def load_rate(model: Path) -> float:
    """In 10^9 bytes of the files a second."""
    layers, device = json.loads((model / "config.json").read_text())["num_hidden_layers"], _device()
    began = time.monotonic()
    stage = load_stage(StageSpec(str(model), LayerSpan(0, layers), "bfloat16", "auto", str(device), None), lambda *_: None)
    rate = stage.bytes_read / 1e9 / (time.monotonic() - began)
    print(f"{model.name}: {rate:.2f} GB/s", flush=True)
    del stage
    free()
    return rate


# -- the kernels ----------------------------------------------------------------------------------------------------------


Parts = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of a matrix."""


def kernels(experts: int, sizes: Sequence[tuple[int, int]]) -> list[Row]:
    """How long it takes to unpack all experts of a layer: FP8 as extents come and all at once, every 4-bit method all at once.

    `sizes` are other ones to try of a program for 8 bits: chunks and warps.
    """
    if not is_exact(_device()):
        raise SystemExit("The fused kernels have not torch's bits here, or cannot be made.")
    in_blocks = ScaledUnpack((128, 128))
    rows = [
        _row("FP8 in blocks of 128 x 128, one launch", experts, in_blocks, _fp8, len(SHAPES) * experts, f"at most {TARGET_MS}"),
        _row("the same, a launch for 32 MiB", experts, in_blocks, _fp8, EXTENT_MATRICES),
    ]
    usual = fused.CHUNKS, fused.WARPS
    for fused.CHUNKS, fused.WARPS in sizes:
        name = f"FP8, one launch, programs of {fused.CHUNKS * fused.CHUNK} values and {fused.WARPS} warps"
        rows.append(_row(name, experts, in_blocks, _fp8, len(SHAPES) * experts))
    fused.CHUNKS, fused.WARPS = usual
    along_rows: tuple[Packed, ...] = (
        mxfp4.COMPRESSED,
        nvfp4.MODELOPT,
        nvfp4.COMPRESSED,
        PackQuantized(32),
        PackQuantized(128, is_symmetric=False),
    )
    for method in along_rows:
        name = f"{method.name}{' (compressed-tensors)' if method is nvfp4.COMPRESSED else ''}"
        rows += [_row(name, experts, method.unpacking(), partial(_pieces, method), len(SHAPES) * experts)]
    transposed: Mapping[str, Packed] = {"": Awq(128), ", groups in order": Gptq(128, in_order=True), ", groups in any order": Gptq(128)}
    for order, method in transposed.items():
        name = f"{method.name}{order}"
        rows.append(_row(name, experts, method.unpacking(), partial(_pieces, method), len(SHAPES) * experts, is_transposed=True))
    return rows


def _fp8(shape: tuple[int, int]) -> Parts:
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    return {"values": (shape, torch.float8_e4m3fn), "scale": (blocks, torch.float32)}


def _pieces(method: Packed, shape: tuple[int, int]) -> Parts:
    return {name: (piece.shape, piece.dtypes[0]) for name, piece in method.pieces(shape).items()}


def _row(
    name: str,
    experts: int,
    unpack: Unpack,
    parts_of: Callable[[tuple[int, int]], Parts],
    matrices: int,
    target: str = "",
    *,
    is_transposed: bool = False,
) -> Row:
    """Milliseconds for a layer, by launches of so many matrices, which are of random bytes."""
    (height, width), _, last = SHAPES
    stacked, down = (torch.empty(experts, *shape, dtype=torch.bfloat16, device=_device()) for shape in ((2 * height, width), last))
    table, listed, at = fused.KernelTable(), [], 0
    for expert in range(experts):
        for shape, into in zip(SHAPES, (stacked[expert, :height], stacked[expert, height:], down[expert]), strict=True):
            places, at = _places(parts_of(shape), at)
            listed.append(RowsToLoad("", places, unpack, into.t() if is_transposed else into))
            assert fused.is_for_kernel(listed[-1], into.device)
            table.add(listed[-1], {name: place.offset for name, place in places.items()})
    data = torch.randint(256, (at,), dtype=torch.uint8, device=_device())
    for group in [wanted.parts["group"] for wanted in listed if "group" in wanted.parts]:
        data[group.offset : group.stop] = 0  # a group that there is
    table.to(_device())
    times_ms = []
    for _ in range(1 + LAUNCHES):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for first in range(0, len(table), matrices):
            table.run(data, slice(first, min(first + matrices, len(table))))
        ended.record()
        torch.cuda.synchronize()
        times_ms.append(began.elapsed_time(ended))
    ms, num_bytes = statistics.median(times_ms[1:]), at + stacked.nbytes + down.nbytes
    note = f"median of {LAUNCHES}, {min(times_ms[1:]):.2f} to {max(times_ms[1:]):.2f}; {num_bytes / ms / 1e9:.2f} TB/s read and written"
    return Row(name, ms, "ms", target=target, note=note)


def _places(parts: Parts, at: int) -> tuple[dict[str, Range], int]:
    """Where parts lie one after the other from a byte on, and where they end, at a multiple of 16."""
    places = {}
    for name, (shape, dtype) in parts.items():
        places[name] = Range("", at, prod(shape) * dtype.itemsize, dtype, shape)
        at = -(-places[name].stop // 16) * 16
    return places, at


def _device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
