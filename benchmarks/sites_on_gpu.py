"""What sites, chosen tokens and statistics cost on a GPU, at MiniMax-M2's real dimensions: one loaded stage, side by side.

    python -m benchmarks.sites_on_gpu FOLDER price       # milliseconds of a micro-batch against the bare forward pass and the bus
    python -m benchmarks.sites_on_gpu FOLDER memory      # GPU and host peaks of `m2ray extract` with all sites, against the plan

Needs a CUDA device with 24 GB and 8 GB more a layer, 4 GB of disk a layer, 4 GB of host memory a layer, and for `memory` 25 GB of FOLDER or
of /dev/shm. With `--tiny` both are tried on a CPU, and nothing recorded.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.against_guide import TINY, make_prompts
from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.depth import Depth, memory_rows, run, speed_row
from benchmarks.extract_on_gpu import MEMORY, measure_profile
from benchmarks.gpu_stage import BATCH_TOKENS, micro_batch
from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.selection import Selection
from m2ray.sites import SITES

SMALL = TINY | {"vocab_size": 4096}
SHAPE = (32, 512)
MICRO_BATCHES, ROUNDS = 16, 3
SETTLING = 4
"""Micro-batches before the clock runs: graphs are compiled, and memory of each that is under way is pinned."""


def main() -> None:
    parts = {"price": price, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--memory", type=Path, default=MEMORY / "m2ray", help="a folder of a file system in memory")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    size = f"{options.layers} layers at MiniMax-M2's real dimensions"
    for rows in parts[options.part](options):
        if options.tiny:
            print(*rows, sep="\n")
        else:
            record(f"sites_on_gpu_{options.part}", f"All sites, chosen tokens and statistics, {options.part}: {size}", rows)


# -- price ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One way to run the stage. `copies_out` is False where nothing is captured: layers with their hooks alone."""

    name: str
    target: str
    capture: CaptureSpec
    copies_out: bool = True


def price(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Each way in turn, ROUNDS times, with the bare forward pass before it. The rows after each round: a machine's time may end before the last."""
    device = "cpu" if options.tiny else "cuda:0"
    stage = loaded(options, device)
    shape = (2, 64) if options.tiny else SHAPE
    ways = list(measured_ways(stage))
    bare, found = {way.name: list[float]() for way in ways}, {way.name: list[float]() for way in ways}
    nothing = Measured("bare", "", CaptureSpec({}, "bfloat16"), copies_out=False)
    stage.warm_up(shape[0] * shape[1])
    bus = 1e9 if options.tiny else bus_bytes_per_s()
    for _ in range(1 if options.tiny else ROUNDS):
        for way in ways:
            bare[way.name].append(taken_ms(stage, shape, nothing))
            found[way.name].append(taken_ms(stage, shape, way))
            print(f"{way.name}: {found[way.name][-1]:.2f} ms, bare {bare[way.name][-1]:.2f} ms", flush=True)
        rows = [against(stage, way, found[way.name], bare[way.name], shape, bus) for way in ways]
        yield [Row("the bus: device to pinned host memory", bus / 1e9, "GB/s"), *rows]


def loaded(options: argparse.Namespace, device: str) -> Stage:
    model = real_size(options.folder, options.layers, SMALL if options.tiny else None)
    spec = StageSpec(
        str(model), LayerSpan(0, options.layers), "bfloat16", "auto", device, None, compile=not options.tiny, with_final_norm=True
    )
    return load_stage(spec, lambda *_: None)


def measured_ways(stage: Stage) -> Iterator[Measured]:
    sites = stage._decoder.site_layers  # noqa: SLF001 - those that the model has
    assert set(sites) == set(SITES), "the benchmark says that it takes all sites"
    residual, routers = {"residual": sites["residual"]}, {"router_topk": sites["router_topk"]}
    of_residual = {"moments": residual, "norms": residual}
    last = Selection("last")
    yield Measured("compiled layers with every hook, nothing copied out", "0.97", CaptureSpec(sites, "bfloat16"), copies_out=False)
    yield Measured("residual of every layer", "0.97", CaptureSpec(residual, "bfloat16"))
    yield Measured("residual of every layer, with rows' CRCs", "0.95", CaptureSpec(residual, "bfloat16", with_crcs=True))
    yield Measured("all nine sites of every layer", "0.9", CaptureSpec(sites, "bfloat16"))
    yield Measured("residual of every layer, the last token", "0.97", CaptureSpec(residual, "bfloat16", last))
    yield Measured("all nine sites of every layer, the last token", "0.97", CaptureSpec(sites, "bfloat16", last))
    yield Measured("moments and norms of residual, no rows", "0.97", CaptureSpec({}, "bfloat16", statistics=of_residual))
    every = {**of_residual, "experts": routers}
    yield Measured("moments, norms and experts of every layer, no rows", "0.97", CaptureSpec({}, "bfloat16", statistics=every))
    covariance = {**of_residual, "covariance": residual}
    yield Measured("moments, norms and covariance of residual, no rows", "", CaptureSpec({}, "bfloat16", statistics=covariance))


def against(stage: Stage, way: Measured, took: list[float], bare: list[float], shape: tuple[int, int], bus: float) -> Row:
    """Tokens a second against the slower of the bare forward pass beside it and, where rows are copied, the bus."""
    tokens, milliseconds = shape[0] * shape[1], statistics.median(took)
    stage.begin(way.capture)
    rows = tokens if way.capture.selection.is_all else shape[0]
    num_bytes = rows * sum(part.row_bytes for part in stage.parts) if way.copies_out else 0
    bus_ms, bare_ms = num_bytes / bus * 1e3, statistics.median(bare)
    binds, bound_ms = ("the bus", bus_ms) if bus_ms > bare_ms else ("bare forward of the same modules", bare_ms)
    ratio = (
        bound_ms / milliseconds if binds == "the bus" else statistics.median(each / other for each, other in zip(bare, took, strict=True))
    )
    note = (
        f"{milliseconds:.2f} ms a micro-batch, rounds {', '.join(f'{each:.2f}' for each in took)}; bare {bare_ms:.2f} ms; "
        f"{num_bytes / tokens / 1e3:.1f} kB of rows a token, {bus_ms:.2f} ms of the bus a micro-batch"
    )
    return Row(way.name, tokens / milliseconds, "ktok/s", tokens / bound_ms, binds, ratio, way.target, note)


def taken_ms(stage: Stage, shape: tuple[int, int], way: Measured) -> float:
    """Milliseconds of a micro-batch, in the mean of MICRO_BATCHES, two under way."""
    stage.begin(way.capture)
    return timed_ms(captured_step(stage, shape) if way.copies_out else bare_step(stage, shape))


def bare_step(stage: Stage, shape: tuple[int, int]) -> Callable[[], object]:
    """The span's own forward pass with what hooks are asked for."""
    decoder = stage._decoder  # noqa: SLF001 - the span without a capture
    token_ids_BT = torch.from_numpy(micro_batch(shape).token_ids_BT).to(decoder.device, torch.int64)

    def step() -> None:
        with torch.inference_mode():
            decoder.run(token_ids_BT, None, lambda *_: None)

    return step


def captured_step(stage: Stage, shape: tuple[int, int]) -> Callable[[], object]:
    """A micro-batch whose rows and statistics end in host memory; those of two before it may still be under way."""
    batch, under_way = micro_batch(shape), []

    def step() -> None:
        under_way.append(stage.forward(batch, None))
        if len(under_way) > 2:
            assert under_way.pop(0).captured

    return step


def timed_ms(step: Callable[[], object]) -> float:
    for _ in range(SETTLING):
        step()
    synchronize()
    began = time.monotonic()
    for _ in range(MICRO_BATCHES):
        step()
    synchronize()
    return (time.monotonic() - began) / MICRO_BATCHES * 1e3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bus_bytes_per_s() -> float:
    """Of copies of 256 MiB from the GPU into pinned memory."""
    there = torch.empty(256 << 20, dtype=torch.uint8, device="cuda:0")
    here = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    milliseconds = timed_ms(lambda: here.copy_(there, non_blocking=True))
    return there.nbytes / milliseconds * 1e3


# -- memory ---------------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> Iterator[list[Row]]:
    """What a job with all sites of every layer takes, of some micro-batches."""
    folder, place = options.folder.resolve(), options.memory.resolve()
    for each in (folder, place):
        each.mkdir(parents=True, exist_ok=True)
    model = real_size(folder, options.layers, SMALL if options.tiny else None)
    if not (profile := folder / "profile.json").exists():
        measure_profile(profile, place, model, BATCH_TOKENS)
    prompts = make_prompts(folder, model, 20 if options.tiny else 400, BATCH_TOKENS)
    depth = Depth(folder, place, options.layers, 1, len(prompts.batches), 0, options.tiny)
    found = run(depth, "sites", prompts, model=model, stages=1, sites=",".join(SITES), layers="all")
    what = "all nine sites of every layer"
    yield [speed_row(what, found), *memory_rows(what, found)]


if __name__ == "__main__":
    main()
