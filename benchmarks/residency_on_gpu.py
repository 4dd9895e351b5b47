"""Packed layers on one GPU, at MiniMax-M2's real dimensions: in its memory, in host memory, in the model's own files; each beside layers that are ready.

    python -m benchmarks.residency_on_gpu FOLDER make [--disk FOLDER]     # FOLDER is best in memory; --disk gets three layers, for `checkpoint`
    python -m benchmarks.residency_on_gpu FOLDER packed                   # waves of 65,536 tokens, all layers packed in GPU memory
    python -m benchmarks.residency_on_gpu FOLDER host [--beside CHECKOUT] # 12 layers in host memory, GPU memory limited to 24 GB
    python -m benchmarks.residency_on_gpu DISK checkpoint                 # read from the disk each wave, page cache cold, 8 GB of host memory (root)
    python -m benchmarks.residency_on_gpu FOLDER start                    # from the beginning of loading to the last layer's first output

Needs an H200, 47 GB for the checkpoint, 45 GB of host memory beside it, and 11 GB of disk. Rows are compared bit by bit in each part. With `--tiny` all
are tried on a CPU, and nothing is recorded.

With `--beside` the build of commit 6feae92 and accelerate's cpu_offload are measured first, in processes of their own; else what they did on 29 November
2026 is what `host` is held against. CHECKOUT is made by `mkdir CHECKOUT && git archive 6feae92 m2ray | tar -x -C CHECKOUT`, 100 GB of host memory needed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.against_guide import TINY
from benchmarks.checkpoints import free, link, real_size
from benchmarks.gpu_stage import drop_caches, layer_operations, raw_rate, span_ranges
from benchmarks.host_memory import limited_host_memory
from benchmarks.records import Row, record
from benchmarks.residency_stages import Bench, all_in, allocated, bitwise, peak, run_wave, synchronize, tokens_of
from benchmarks.runs import ROOT
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.tensor_table import tensor_table, up_to_layer

LAYERS, DISK_LAYERS = 12, 3
PACKED_WAVE, HOST_WAVE = 65_536, 131_072
ROUNDS = 3
SETTLING_S = 5
"""What is read ahead at the end of a round takes."""
HOST_LIMIT_BYTES = 8 * 10**9
"""For `checkpoint`, the page cache and this process among them: three layers have 11 GB."""
GPU_LIMIT_BYTES = 24 * 10**9
RECORDED = {"m2ray at 6feae92": 24_200.0, "accelerate cpu_offload": 3_200.0}
"""Tokens a second through 6 layers, 5 of them in host memory, on such a machine on 29 November 2026."""
PEER_TIMEOUT_S = 420


def main() -> None:
    parts = {"packed": packed, "host": host, "checkpoint": checkpoint, "start": start}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["make", *parts])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--beside", type=Path, help="a folder with m2ray as it was at commit 6feae92")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.part == "make":
        model = real_size(options.folder, options.layers or LAYERS, TINY if options.tiny else None)
        if options.disk is not None:
            copy_first(model, options.disk.resolve() / model.name.replace(str(options.layers or LAYERS), str(DISK_LAYERS), 1), DISK_LAYERS)
        return
    bench = Bench(options.folder, options.tiny, options.beside)
    rows = parts[options.part](bench, options.layers)
    title = f"Packed layers on one GPU at MiniMax-M2's real dimensions: {options.part}"
    _ = print(*rows, sep="\n") if options.tiny else record(f"residency_on_gpu_{options.part}", title, rows)


def copy_first(larger: Path, model: Path, layers: int) -> None:
    """A model of the first layers, whose files are copied; the others are links."""
    model.parent.mkdir(parents=True, exist_ok=True)
    link(larger, model, layers)
    for file in set(up_to_layer(open_checkpoint(str(model)), layers - 1)[0].weight_map.values()):
        (model / file).unlink()
        shutil.copyfile(larger / file, model / file)
    print(f"{model}: {layers} layers copied", flush=True)


# -- packed ---------------------------------------------------------------------------------------------------------------


def packed(bench: Bench, layers: int | None) -> list[Row]:
    """Both stages are on the GPU at once, and run in turns."""
    layers = layers or (3 if bench.tiny else 6)
    tokens = tokens_of(bench, PACKED_WAVE)
    ready = bench.load(layers)
    before = allocated()
    there = bench.load(layers, all_in("gpu_packed", layers), tokens)
    weights_bytes = allocated() - before
    expected = bench.rows(ready, layers, 2)
    equal = bitwise(expected, bench.rows(there, layers, 2))
    for stage in (ready, there):
        bench.wave_s(stage, tokens)
    times = [(bench.wave_s(ready, tokens), bench.wave_s(there, tokens)) for _ in range(ROUNDS)]
    ready_s, there_s = (statistics.median(each) for each in zip(*times, strict=True))
    one_s = [(bench.wave_s(ready, 1), bench.wave_s(there, 1)) for _ in range(ROUNDS)]
    beside = [peak(partial(bench.wave_s, stage, tokens)) for stage in (ready, there)]
    table = tensor_table(open_checkpoint(str(bench.model(layers))))
    embedding = table.role_bytes("embedding", 2)
    formula = sum(table.packed_bytes()[:layers]) + max(table.unpacked_bytes("bfloat16")) + embedding + beside[0]
    spread = ", ".join(f"{one / other:.3f}" for one, other in times)
    config = json.loads((bench.model(layers) / "config.json").read_text())
    speed = layers * layer_operations(config, *bench.shape) * tokens / (bench.shape[0] * bench.shape[1]) / ready_s / 1e12
    return [
        Row(
            f"packed in GPU memory, {layers} layers, waves of {tokens:,} tokens",
            tokens / there_s,
            "tokens/s",
            tokens / ready_s,
            "layers that are ready, the same micro-batches:",
            ready_s / there_s,
            "0.92",
            f"rounds {spread}; {(there_s - ready_s) / layers * 1e3:.2f} ms a layer and wave more; ready layers {speed:.0f} TFLOP/s; {equal}",
        ),
        Row(
            "the same, one micro-batch at a time",
            bench.shape[0] * bench.shape[1] / statistics.median(other for _, other in one_s),
            "tokens/s",
            bench.shape[0] * bench.shape[1] / statistics.median(one for one, _ in one_s),
            "layers that are ready:",
            statistics.median(one / other for one, other in one_s),
        ),
        Row(
            "GPU peak of the packed stage",
            (weights_bytes + beside[1]) / 1e9,
            "GB",
            formula / 1e9,
            "packed weights, one layer's workspace, embedding, and what the ready stage takes beside its weights:",
            (weights_bytes + beside[1]) / max(formula, 1),
            "at most 1.02",
            f"beside the weights {beside[1] / 1e9:.2f} GB of the packed stage, {beside[0] / 1e9:.2f} GB of the ready one",
        ),
    ]


# -- host -----------------------------------------------------------------------------------------------------------------


def host(bench: Bench, layers: int | None) -> list[Row]:
    layers, few = layers or (6 if bench.tiny else LAYERS), 3 if bench.tiny else 6
    tokens = tokens_of(bench, HOST_WAVE)
    others, when = (RECORDED, "as recorded") if bench.beside is None else (others_rates(bench, bench.beside, few), "just before")
    ready = bench.load(few)
    expected = bench.rows(ready, few, 2)
    bench.wave_s(ready, tokens)
    ready_s = statistics.median(bench.wave_s(ready, tokens) for _ in range(ROUNDS)) / few
    del ready
    free()
    if not bench.tiny:
        torch.cuda.set_per_process_memory_fraction(GPU_LIMIT_BYTES / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
    stage = bench.load(layers, all_in("host", layers), tokens)
    equal = bitwise(expected, bench.rows(stage, few, 2))
    bench.wave_s(stage, tokens)
    waves = [bench.wave_s(stage, tokens) / layers for _ in range(2)]
    half_s = bench.wave_s(stage, tokens // 2) / layers
    wave_s = statistics.median(waves)
    reserved = torch.cuda.max_memory_reserved() / 1e9 if not bench.tiny else 0.0
    what = f"in host memory, {layers} layers, waves of {tokens:,} tokens, GPU memory limited to 24 GB"
    note = f"{wave_s * 1e3:.1f} ms a layer and wave, ready {ready_s * 1e3:.1f}; waves half as large: {half_s * 1e3:.1f} ms; "
    note += f"at most {reserved:.1f} GB reserved on the GPU; {equal}"
    through_few = tokens / wave_s / few
    of_62 = tokens / wave_s / 62
    return [
        Row(
            what,
            tokens / wave_s,
            "tokens/s a layer",
            tokens / ready_s,
            "layers that are ready:",
            ready_s / wave_s,
            "0.89",
            note,
        ),
        *(
            Row(f"through {few} layers", through_few, "tokens/s", others[name], f"{name}, {when}:", through_few / others[name], target)
            for name, target in zip(RECORDED, ("7.4", "55"), strict=True)
        ),
        Row("through 62 layers, by this rate", of_62, "tokens/s", note="the whole of MiniMax-M2 on one GPU; nothing captured"),
    ]


def others_rates(bench: Bench, checkout: Path, layers: int) -> dict[str, float]:
    """Tokens a second, as `RECORDED` has them, measured by each in a process of its own."""
    assert (checkout / "m2ray/model/offload.py").exists(), f"{checkout} holds no m2ray of commit 6feae92"
    shape = ["--sequences", str(bench.shape[0]), "--length", str(bench.shape[1]), "--device", bench.device]
    programs = {"m2ray at 6feae92": ["with_m2ray_6feae92", "--layers", str(layers)], "accelerate cpu_offload": ["with_accelerate"]}
    paths = [str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]  # what else is needed may be there alone
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found = {}
    for name, (program, *more) in programs.items():
        began = time.monotonic()
        words = [sys.executable, str(ROOT / f"benchmarks/peers/{program}.py"), str(bench.model(layers)), *more, *shape]
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, timeout=PEER_TIMEOUT_S, check=True)
        found[name] = float(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])
        print(f"{name}: {found[name]:,.0f} tokens/s, {time.monotonic() - began:.0f} s in all", flush=True)
    return found


# -- checkpoint -----------------------------------------------------------------------------------------------------------


def checkpoint(bench: Bench, layers: int | None) -> list[Row]:
    """One micro-batch a wave, not compiled, so that the disk binds; from the drop of the page cache until as many layers have been read as there are.

    Before a round the first layer has landed, and no other; it ends when that has landed once more.
    """
    layers = layers or DISK_LAYERS
    model = bench.model(layers)
    with nullcontext() if bench.tiny else limited_host_memory(HOST_LIMIT_BYTES):
        return list(from_files(bench, model, layers))


def from_files(bench: Bench, model: Path, layers: int) -> Iterator[Row]:
    ranges = [] if bench.tiny else layer_ranges(model, layers)
    few = 1
    ready = bench.load(few, compiled=False)
    expected = bench.rows(ready, few, 1)
    del ready
    free()
    stage = bench.load(layers, all_in("checkpoint", layers), 1, compiled=False)
    equal = bitwise(expected, bench.rows(stage, few, 1))
    layer_bytes = sum(tensor_table(open_checkpoint(str(model))).packed_bytes()[:layers])
    raw, found = [], []
    for _ in range(3):
        run_wave(stage, [bench.batch])
        if not bench.tiny:
            time.sleep(SETTLING_S)
            raw.append(raw_rate_cold(ranges))
            drop_caches()
        began = time.monotonic()
        run_wave(stage, [bench.batch])
        _ = next(stage.forward_wave(deque([(bench.batch, None)] * 2))).captured
        synchronize()
        found.append(layer_bytes / 1e9 / (time.monotonic() - began))
        print(f"read {raw[-1:]} GB/s, waves {found[-1]:.3f} GB/s", flush=True)
    if not bench.tiny:
        raw.append(raw_rate_cold(ranges))  # a disk's rate drifts: it is read before, between and after the rounds
    rate, disk = statistics.mean(found), statistics.mean(raw or [1.0])
    note = f"rounds {', '.join(f'{each:.2f}' for each in found)} beside {', '.join(f'{each:.2f}' for each in raw)} GB/s; {equal}"
    what = f"from the checkpoint on disk, {layers} layers of {layer_bytes / 1e9:.1f} GB, page cache cold, host memory limited to {HOST_LIMIT_BYTES / 1e9:.0f} GB"
    yield Row(what, rate, "GB/s", disk, "parallel pread of the same bytes, cold:", rate / disk, "0.9", note)


def raw_rate_cold(ranges: list[tuple[Path, int, int]]) -> float:
    drop_caches()
    return raw_rate(ranges, 16)


def layer_ranges(model: Path, layers: int) -> list[tuple[Path, int, int]]:
    """Those of the layers' own bytes, the embedding left out."""
    found = span_ranges(model, layers)
    embedding = open_checkpoint(str(model)).headers["model.embed_tokens.weight"]
    inside = range(embedding.offset, embedding.offset + embedding.num_bytes)
    return [each for each in found if not (each[0].name == embedding.file and each[1] in inside)]


# -- start ----------------------------------------------------------------------------------------------------------------


def start(bench: Bench, layers: int | None) -> list[Row]:
    """5 of 6 layers in host memory, not compiled."""
    layers = layers or (3 if bench.tiny else 6)
    model = bench.model(layers)
    if not bench.tiny:
        torch.zeros(1, device="cuda")
    alone = [1.0 if bench.tiny else read_and_register(model, layers)]
    began = time.monotonic()
    stage = bench.load(layers, dict.fromkeys(range(1, layers), "host"), compiled=False)
    loaded_s = time.monotonic() - began
    stage.begin(CaptureSpec({"residual": (layers - 1,)}, "bfloat16"))
    _ = stage.forward(bench.batch, None).captured
    synchronize()
    first_s = time.monotonic() - began
    del stage
    free()
    if not bench.tiny:
        alone.append(read_and_register(model, layers))
    note = f"loaded in {loaded_s:.2f} s; read and registered in {', '.join(f'{each:.2f}' for each in alone)} s, before and after"
    what = f"from the begin of loading to the first micro-batch out of the last layer, {layers - 1} of {layers} layers in host memory"
    base = statistics.mean(alone)
    return [Row(what, first_s, "s", base, "reading those bytes into fresh memory and registering it:", first_s / base, "8 s, or 1.2", note)]


def read_and_register(model: Path, layers: int) -> float:
    """Seconds in which 16 threads read as many bytes as will lie in host memory into fresh memory, and it is registered."""
    ranges = layer_ranges(model, layers)
    ranges = ranges[: len(ranges) * (layers - 1) // layers]
    places = np.cumsum([0] + [size for _, _, size in ranges])
    began = time.monotonic()
    memory = torch.empty(int(places[-1]), dtype=torch.uint8)

    def read(number: int) -> None:
        for (path, begin, size), at in zip(ranges[number::16], places[number::16], strict=False):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.preadv(fd, [memory[at : at + size].numpy().data], begin)
            finally:
                os.close(fd)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    assert int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0
    elapsed_s = time.monotonic() - began
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    return elapsed_s


if __name__ == "__main__":
    main()
