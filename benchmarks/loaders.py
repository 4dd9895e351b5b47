"""Ways from a checkpoint's files to a GPU: m2ray's own, fastsafetensors, runai-model-streamer and safetensors, against a plain parallel read.

    python -m benchmarks.loaders FOLDER

The others come with m2ray[gpu]. Only m2ray's `load_stage` also dequantises FP8 and lays tensors where the model has them; the
others end with the files' own bytes on the GPU. Needs a GPU with 56 GB and 24.5 GB of disk.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.gpu_stage import drop_caches, require_root, spec
from benchmarks.records import Row, record
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.gpu_loading import Lanes
from m2ray.model.pieces import PIECE_BYTES
from m2ray.model.stage import load_stage

GPU = "cuda:0"
COLD_FILES = 3
READ_BYTES = 16 << 20
STREAMER_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=3, help="with a warm page cache, beside the first in the process")
    options = parser.parse_args()
    require_root()
    if missing := [name for name in ("fastsafetensors", "runai_model_streamer") if find_spec(name) is None]:
        raise SystemExit(f"{', '.join(missing)} must be installed: pip install -c constraints.txt '.[gpu]'")
    model = real_size(options.folder, options.layers)
    files = sorted(model.glob("*.safetensors"))
    members: dict[str, Callable[[list[Path]], None]] = {"m2ray's lanes, not dequantised": lambda files: lanes(model, files)}
    members |= {"fastsafetensors": fastsafetensors, "runai-model-streamer": runai, "safetensors, file by file": safetensors}
    torch.zeros(1, device=GPU)
    pread(files, 16)  # the page cache is warm from here on
    whole = f"m2ray load_stage, dequantised, all {options.layers} layers"
    seconds: dict[str, list[float]] = {}
    for _ in range(1 + options.repeats):
        seconds.setdefault("raw", []).append(min(timed(partial(pread, files, threads)) for threads in (8, 16)))
        for name, load in members.items():
            keep(seconds, name, load, files)
        seconds.setdefault(whole, []).append(stage_s(model, options.layers))
    num_bytes = sum(path.stat().st_size for path in files)
    rows = rows_of(seconds, num_bytes, "page cache", {whole: stage_bytes(model)})
    title = f"Loading {options.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint, onto a GPU"
    record("loaders", title, rows)
    cold: dict[str, list[float]] = {}
    for name, load in {"raw": lambda files: pread(files, 16), **members}.items():
        drop_caches()
        keep(cold, name, load, files[:COLD_FILES])
    rows += rows_of(cold, sum(path.stat().st_size for path in files[:COLD_FILES]), "disk", {})
    record("loaders", title, rows)


def keep(seconds: dict[str, list[float]], name: str, load: Callable[[list[Path]], None], files: list[Path]) -> None:
    """Measure a member."""
    elapsed_s = timed(lambda: load(files))
    seconds.setdefault(name, []).append(elapsed_s)
    print(f"{name}: {elapsed_s:.2f} s", flush=True)
    free()


def timed(step: Callable[[], object]) -> float:
    began = time.monotonic()
    step()
    torch.cuda.synchronize()
    return time.monotonic() - began


def rows_of(seconds: dict[str, list[float]], num_bytes: int, source: str, other_bytes: dict[str, int]) -> list[Row]:
    """The first of several is apart: a library is imported, memory pinned, a kernel compiled."""
    base = num_bytes / 1e9 / statistics.median(seconds["raw"][1:] or seconds["raw"])
    rows = []
    for name, (first, *others) in seconds.items():
        times = others or [first]
        rate = other_bytes.get(name, num_bytes) / 1e9 / statistics.median(times)
        target = "0.8" if name.startswith("m2ray load_stage") else ""
        note = f"{len(times)} times, {min(times):.2f} to {max(times):.2f} s{_version(name)}"
        note += f"; the first in the process {first:.2f} s" if others else ""
        if name != "raw":
            what = f"from the {source}: {name}"
            rows.append(Row(what, rate, "GB/s", base, "parallel pread into the same buffers again and again:", rate / base, target, note))
    return rows


def _version(name: str) -> str:
    try:
        return f"; version {version(name.partition(',')[0])}"
    except PackageNotFoundError:
        return ""


def pread(files: list[Path], threads: int) -> None:
    """Every byte of the files into host memory, each thread into one buffer of its own: no page is touched for the first time."""
    pieces = [(path, offset) for path in files for offset in range(0, path.stat().st_size, READ_BYTES)]
    buffers = [bytearray(READ_BYTES) for _ in range(threads)]

    def read(number: int) -> None:
        for path, offset in pieces[number::threads]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.preadv(fd, [buffers[number]], offset)
            finally:
                os.close(fd)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def lanes(model: Path, files: list[Path]) -> None:
    """What `load_stage` does up to the arrival of each tensor on the GPU."""
    names, nowhere = {path.name for path in files}, torch.empty(0)
    checkpoint = open_checkpoint(str(model))
    # A tensor that is larger than an extent is cut, as weights.py does.
    wanted = [
        RowsToLoad(key, {"values": Range(header.file, begin, num_bytes, torch.uint8, (num_bytes,))}, None, nowhere)
        for key, header in checkpoint.headers.items()
        if header.file in names
        for begin in range(header.offset, header.offset + header.num_bytes, PIECE_BYTES)
        for num_bytes in [min(PIECE_BYTES, header.offset + header.num_bytes - begin)]
    ]
    with Lanes(torch.device(GPU)) as readers:
        readers.begin(checkpoint, wanted, WeightDigests(checkpoint.headers, 0), lambda *_: None)
        readers.finish(lambda: None)


def fastsafetensors(files: list[Path]) -> None:
    package = import_module("fastsafetensors")
    loader = package.SafeTensorsFileLoader(None, GPU, nogds=True, set_numa=False, max_threads=16)
    loader.add_filenames({0: [str(path) for path in files]})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        buffers.get_tensor(name)
    torch.cuda.synchronize()
    buffers.close()
    loader.close()


def runai(files: list[Path]) -> None:
    os.environ["RUNAI_STREAMER_CONCURRENCY"], os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = "16", str(STREAMER_BYTES)
    package = import_module("runai_model_streamer")
    kept = []
    with package.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files])
        for _, tensor in streamer.get_tensors():
            kept.append(tensor.to(GPU))


def safetensors(files: list[Path]) -> None:
    _ = [load_file(path, device=GPU) for path in files]


def stage_s(model: Path, num_layers: int) -> float:
    began = time.monotonic()
    stage = load_stage(spec(model, num_layers, compiled=False), lambda *_: None)
    elapsed_s = time.monotonic() - began
    print(f"m2ray load_stage: {elapsed_s:.2f} s, {stage.bytes_read / 1e9 / elapsed_s:.2f} GB/s", flush=True)
    del stage
    free()
    return elapsed_s


def stage_bytes(model: Path) -> int:
    """What `load_stage` reads: the files without the head and the final norm."""
    checkpoint = open_checkpoint(str(model))
    unread = [header.num_bytes for key, header in checkpoint.headers.items() if key in {"lm_head.weight", "model.norm.weight"}]
    return sum(header.num_bytes for header in checkpoint.headers.values()) - sum(unread)


if __name__ == "__main__":
    main()
