"""One stage at MiniMax-M2's real dimensions on a GPU: loading, one layer's speed, and what capturing every layer costs.

Needs a CUDA device with 24 GB and 8 GB more a layer, and 4 GB of disk a layer: 6 layers fit a card of 80 GB.
"""

import argparse
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.records import Row, record
from benchmarks.runs import peak_rss_bytes
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.bench.measuring import DiscardingStore
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.stage_output import StageOutput
from m2ray.model.tensor_table import tensor_table

READ_BYTES = 16 << 20
BATCH_TOKENS = 16_384
SHAPES = ((8, 2048), (32, 512))
REPEATS = 2
MICRO_BATCHES, SHARD_MICRO_BATCHES = 48, 4
"""As many of each kind, since a GPU at work for longer is slower."""
QUEUE_BYTES = 4 << 30
TIMEOUT_S = 60.0
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LOADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("half", choices=("running", "loading"), help="each takes the GPU for itself")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    model = real_size(arguments.folder, arguments.layers)
    size = f"{arguments.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint, bfloat16"
    if arguments.half == "running":
        config = json.loads((model / "config.json").read_text())
        record("gpu_stage", f"A stage of {size}", running(model, arguments.layers, config))
    else:
        record("gpu_loading", f"Loading {size}", loading(model, arguments.layers))


def spec(model: Path, num_layers: int, *, compiled: bool) -> StageSpec:
    return StageSpec(str(model), LayerSpan(0, num_layers), "bfloat16", "auto", "cuda:0", None, compile=compiled)


# -- loading --------------------------------------------------------------------------------------------------------------


def loading(model: Path, num_layers: int) -> list[Row]:
    """FP8 from disk to bfloat16 on the GPU, all that load_stage does, against a plain parallel read of the same bytes; interleaved."""
    require_root()
    raw: dict[str, list[float]] = {"warm": [], "cold": []}
    fresh: list[float] = []
    loaded: dict[str, list[float]] = {"warm": [], "cold": []}
    torch.zeros(1, device="cuda")
    ranges = span_ranges(model, num_layers)
    raw_rate(ranges, 8)  # what was made a while ago may be in the page cache in part
    before_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    first = load_rate(model, num_layers)  # a kernel is compiled, memory is pinned
    host_bytes = peak_rss_bytes(os.getpid()) - before_bytes
    largest_bytes = max(path.stat().st_size for path in model.glob("*.safetensors"))
    for state, repeats in (("warm", LOADS), ("cold", 1)):
        for _ in range(repeats):
            if state == "cold":
                drop_caches()
            raw[state].append(max(raw_rate(ranges, threads) for threads in ((8,) if state == "cold" else (4, 8, 16))))
            if state == "cold":
                drop_caches()
            loaded[state].append(load_rate(model, num_layers))
            if state == "warm":
                fresh.append(max(raw_rate(ranges, threads, fresh=True) for threads in (8, 16)))
            print(f"{state}: read {raw[state][-1]:.2f} GB/s, loaded {loaded[state][-1]:.2f} GB/s", flush=True)
    rows = []
    for state, rates in loaded.items():
        rate, base = statistics.median(rates), statistics.median(raw[state])
        what = "from the disk" if state == "cold" else "from the page cache"
        note = ""
        if state == "warm":
            into_fresh = statistics.median(fresh)
            note = f"medians of {len(rates)}, loaded {min(rates):.1f} to {max(rates):.1f}, the first in the process {first:.1f}; "
            note += f"pread into memory that is touched for the first time {into_fresh:.1f} GB/s: {rate / into_fresh:.2f} of it"
        rows.append(Row(f"loading {what}", rate, "GB/s", base, "parallel pread of the same bytes", rate / base, "0.8", note))
    note = f"{span_bytes(ranges) / 1e9:.1f} GB are read; the kernel's compilation is in it"
    share, what = host_bytes / largest_bytes, "host memory that the first loading takes"
    return [*rows, Row(what, host_bytes / 1e9, "GB", largest_bytes / 1e9, "the largest file", share, "at most 1.1", note)]


def require_root() -> None:
    if not os.access(DROP_CACHES, os.W_OK):
        raise SystemExit(f"Only root can empty the page cache ({DROP_CACHES}), and a cold read needs that.")


def drop_caches() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


Ranges = list[tuple[Path, int, int]]


def span_ranges(model: Path, num_layers: int) -> Ranges:
    """(file, begin, bytes) of what the span needs: neighbours joined, cut to READ_BYTES."""
    checkpoint = open_checkpoint(str(model))
    rows = [row for row in tensor_table(checkpoint).rows if row.role == "embedding" or (row.layer is not None and row.layer < num_layers)]
    groups = layout_of(checkpoint.whole_config).group(checkpoint.headers)
    keys = [key for row in rows for source in row.sources for key in groups[source]]
    runs: list[tuple[str, int, int]] = []
    for header in sorted((checkpoint.headers[key] for key in keys), key=lambda header: (header.file, header.offset)):
        begin, stop = header.offset, header.offset + header.num_bytes
        if runs and (runs[-1][0], runs[-1][2]) == (header.file, begin):
            begin = runs.pop()[1]
        runs.append((header.file, begin, stop))
    return [(model / file, at, min(READ_BYTES, stop - at)) for file, begin, stop in runs for at in range(begin, stop, READ_BYTES)]


def span_bytes(ranges: Ranges) -> int:
    return sum(num_bytes for _, _, num_bytes in ranges)


def raw_rate(ranges: Ranges, threads: int, *, fresh: bool = False) -> float:
    """GB/s of reading the ranges once: each thread into one buffer of its own, or into `fresh` memory each time."""
    buffers = [memoryview(bytearray(READ_BYTES)) for _ in range(threads)]

    def read(number: int) -> int:
        num_bytes = 0
        for path, begin, size in ranges[number::threads]:
            buffer = memoryview(bytearray(READ_BYTES)) if fresh else buffers[number]
            fd = os.open(path, os.O_RDONLY)
            try:
                num_bytes += os.preadv(fd, [buffer[:size]], begin)
            finally:
                os.close(fd)
        return num_bytes

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        num_bytes = sum(pool.map(read, range(threads)))
    assert num_bytes == span_bytes(ranges)
    return num_bytes / 1e9 / (time.monotonic() - began)


def load_rate(model: Path, num_layers: int) -> float:
    """GB/s of load_stage, everything in it."""
    began = time.monotonic()
    stage = load_stage(spec(model, num_layers, compiled=False), lambda *_: None)
    rate = stage.bytes_read / 1e9 / (time.monotonic() - began)
    del stage
    free()
    return rate


# -- running --------------------------------------------------------------------------------------------------------------


def running(model: Path, num_layers: int, config: dict[str, int]) -> list[Row]:
    """A layer's speed, compiled and eager, and a bare forward pass against one that captures every layer."""
    rows = []
    stage = load_stage(spec(model, num_layers, compiled=False), lambda *_: None)
    eager = {shape: bare_ms(stage, shape) for shape in SHAPES}
    began = time.monotonic()
    stage._decoder.compile_layers()  # noqa: SLF001 - the same weights, compiled
    stage.warm_up(BATCH_TOKENS, waiting_bytes=QUEUE_BYTES)
    warm_up_s = time.monotonic() - began
    for shape in SHAPES:
        print(f"{shape}: eager {eager[shape] / num_layers:.2f} ms a layer; warm-up {warm_up_s:.0f} s", flush=True)
        times = [(bare_ms(stage, shape), captured_ms(stage, shape), encoded_ms(stage, shape)) for _ in range(REPEATS)]
        bare = statistics.median(each[0] for each in times)
        name = f"{shape[0]} x {shape[1]}"
        operations = layer_operations(config, *shape)
        rows.append(
            Row(
                f"compiled layer, {name}",
                operations / (bare / num_layers) / 1e9,
                "TFLOP/s",
                operations / (eager[shape] / num_layers) / 1e9,
                "eager",
                eager[shape] / bare,
                "400",
                f"{bare / num_layers:.2f} ms; matrix products and causal attention counted; warm-up {warm_up_s:.0f} s",
            )
        )
        for place, how, note in (
            (1, "captured", "every layer's rows in host memory"),
            (
                2,
                "captured and encoded",
                f"parts of {SHARD_MICRO_BATCHES} micro-batches, checksums and all, are discarded once they are encoded",
            ),
        ):
            rows.append(
                Row(
                    f"every layer {how}, {name}",
                    BATCH_TOKENS / statistics.median(each[place] for each in times),
                    "ktok/s",
                    BATCH_TOKENS / bare,
                    "bare forward of the same modules",
                    statistics.median(each[0] / each[place] for each in times),
                    "0.97",
                    note,
                )
            )
    return rows


def layer_operations(config: dict[str, int], sequences: int, length: int) -> float:
    """Floating-point operations of one layer: projections, causal attention, router and the chosen experts."""
    tokens, hidden = sequences * length, config["hidden_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = 2 * config["num_key_value_heads"] * config["head_dim"]
    projections = 2 * tokens * hidden * (2 * query + key_value)
    attention = 2 * 2 * tokens * length / 2 * query
    router = 2 * tokens * hidden * config["num_local_experts"]
    experts = 2 * tokens * config["num_experts_per_tok"] * 3 * hidden * config["intermediate_size"]
    return projections + attention + router + experts


def micro_batch(shape: tuple[int, int]) -> MicroBatch:
    token_ids_BT = np.random.default_rng(0).integers(3, 4000, shape).astype(np.int32)
    return MicroBatch(0, 0, True, np.arange(shape[0]), np.full(shape[0], shape[1], np.int32), token_ids_BT)


def timed_ms(step: Callable[[], object]) -> float:
    step()
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(MICRO_BATCHES):
        step()
    torch.cuda.synchronize()
    return (time.monotonic() - began) / MICRO_BATCHES * 1e3


def bare_ms(stage: Stage, shape: tuple[int, int]) -> float:
    """Milliseconds of the span's own forward pass, nothing kept."""
    token_ids_BT = torch.from_numpy(micro_batch(shape).token_ids_BT).to("cuda", torch.int64)
    with torch.inference_mode():
        return timed_ms(lambda: stage._decoder.run(token_ids_BT, None, lambda *_: None))  # noqa: SLF001 - the span without a capture


def captured_ms(stage: Stage, shape: tuple[int, int]) -> float:
    """Milliseconds of a micro-batch whose every layer ends in host memory, with two micro-batches under way."""
    batch, under_way = micro_batch(shape), []

    def step() -> None:
        under_way.append(stage.forward(batch, None))
        if len(under_way) > 2:
            assert len(under_way.pop(0).captured) == len(stage.parts)

    elapsed_ms = timed_ms(step)
    for output in under_way:
        _ = output.captured
    return elapsed_ms


def encoded_ms(stage: Stage, shape: tuple[int, int]) -> float:
    """The same with a run's own writer, from the first micro-batch to the end of the last part; what it makes is kept nowhere."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    writer = ActivationWriter(DiscardingStore(), {}, stage.parts, queue_bytes=QUEUE_BYTES, threads=threads)
    batch, under_way = micro_batch(shape), deque[tuple[MicroBatch, StageOutput]]()

    def hand_over() -> None:
        taken, output = under_way.popleft()
        writer.submit("bench", taken, output.captured, TIMEOUT_S)

    try:
        began = time.monotonic()
        for number in range(MICRO_BATCHES):
            shard, index = divmod(number, SHARD_MICRO_BATCHES)
            ids = batch.sequence_ids + number * len(batch.sequence_ids)
            taken = replace(batch, shard=shard, index=index, is_last=index == SHARD_MICRO_BATCHES - 1, sequence_ids=ids)
            under_way.append((taken, stage.forward(taken, None)))
            if len(under_way) > 2:
                hand_over()
        while under_way:
            hand_over()
        for shard in range(MICRO_BATCHES // SHARD_MICRO_BATCHES):
            assert len(writer.collect(shard, "bench", TIMEOUT_S)) == len(stage.parts)
        return (time.monotonic() - began) / MICRO_BATCHES * 1e3
    finally:
        writer.close()


if __name__ == "__main__":
    main()
