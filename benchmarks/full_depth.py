"""All 62 layers at MiniMax-M2's real dimensions on one node of several GPUs, held against `m2ray plan`. A part a command, each below ten minutes.

    python -m benchmarks.full_depth FOLDER make --on-disk 16      # the random FP8 checkpoint, 230 GB; files of later layers lie in --memory
    python -m benchmarks.full_depth FOLDER extract                # a million tokens with few layers, then all layers, against plan --profile
    python -m benchmarks.full_depth FOLDER alone                  # each stage alone on its GPU: loading, and what the chain is held against
    python -m benchmarks.full_depth FOLDER transport              # from GPU to GPU against the object store, by one loaded chain
    python -m benchmarks.full_depth FOLDER faults                 # a stage killed; two replicas; a GPU that is another's
    python -m benchmarks.full_depth FOLDER guide                  # the guide's method at the depth that its loader brings

`alone` and `transport` are in benchmarks/full_depth_stages.py. Runs are written into --memory, so no disk binds. With `--tiny` all of it is
tried on a CPU, and nothing recorded. Needs GPUs with 8 GB a layer and 30 GB each, and memory for the checkpoint's files there and 150 GB.
"""

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from benchmarks.against_guide import TINY, make_prompts
from benchmarks.checkpoints import real_size, spread
from benchmarks.depth import BATCH_TOKENS, ROW_BYTES, Depth, Ran, memory_rows, run, speed_row
from benchmarks.extract_on_gpu import GUIDE_PROMPTS, MEMORY, guide_tokens_per_s, measure_profile, written_bytes_per_s
from benchmarks.extract_on_gpu import alone as in_a_process
from benchmarks.full_depth_stages import alone, transport
from benchmarks.records import Row
from benchmarks.runs import stage_processes


def main() -> None:
    parts = {"make": make, "extract": extraction, "alone": alone, "transport": transport, "faults": faults, "guide": against_guide}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--memory", type=Path, default=MEMORY / "m2ray", help="a folder of a file system in memory")
    parser.add_argument(
        "--on-disk", type=int, help="layers whose files lie in FOLDER; default: all, where its disk takes 1 GB/s, else none"
    )
    parser.add_argument("--prompts", type=int, default=3600, help="of 283 tokens in the mean")
    parser.add_argument("--rows-gb", type=float, default=150.0, help="rows that the memory takes at one time")
    parser.add_argument("--depth", type=int, default=8, help="of the model that the guide loads, and of the shallow chain")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder, memory = options.folder.resolve(), options.memory.resolve()
    for place in (folder, memory):
        place.mkdir(parents=True, exist_ok=True)
    depth = Depth(folder, memory, options.layers, options.stages, options.prompts, int(options.rows_gb * 1e9), options.tiny)
    parts[options.part](depth, options)


# -- the checkpoint -------------------------------------------------------------------------------------------------------


def make(depth: Depth, options: argparse.Namespace) -> None:
    """Layer by layer on all cores; what is there is not made again."""
    disk = written_bytes_per_s(depth.folder, 8 * [5 * 10**5 if depth.tiny else 5 * 10**8])
    print(f"the disk takes {disk / 1e9:.2f} GB/s", flush=True)
    here = options.on_disk if options.on_disk is not None else depth.layers if disk >= 1e9 else 0
    began = time.monotonic()
    _, num_bytes = spread(depth.folder, depth.memory, depth.layers, here, TINY if depth.tiny else None)
    seconds = time.monotonic() - began
    note = (
        f"{num_bytes / 1e9:.0f} GB in {seconds:.0f} s by {os.cpu_count()} processes; layers 0-{here - 1} on the disk, the others in memory"
    )
    depth.record(
        "make", "The checkpoint", [Row("random FP8 checkpoint made", num_bytes / 1e9 / seconds, "GB/s", disk / 1e9, "disk", note=note)]
    )


# -- extraction against the plan -----------------------------------------------------------------------------------------


def extraction(depth: Depth, _: argparse.Namespace) -> None:
    """Few layers of a million tokens, and all layers of as many tokens as memory takes."""
    profile = depth.folder / "profile.json"
    if not profile.exists():
        measure_profile(profile, depth.memory, depth.model, BATCH_TOKENS)
    rows: list[Row] = []
    fitting = min(depth.prompts, int(depth.prompts * depth.rows_bytes / (depth.prompts * 283 * depth.layers * ROW_BYTES)))
    for name, layers, count in (("few", depth.few, depth.prompts), ("all", tuple(range(depth.layers)), fitting)):
        prompts = depth.made_prompts(count)
        found = run(depth, name, prompts, layers=",".join(map(str, layers)), stages=depth.stages)
        assert found.report["tokens"] == prompts.num_tokens, "both must see the same tokens"
        (depth.folder / f"ran-{name}.json").write_text(json.dumps(found.report))
        what = f"{len(layers)} of {depth.layers} layers kept"
        rows += [speed_row(what, found), *memory_rows(what, found)]
        depth.record("extract", "m2ray extract against the plan", rows)


# -- faults ---------------------------------------------------------------------------------------------------------------


def faults(depth: Depth, _: argparse.Namespace) -> None:
    """A stage killed in the middle of a run; two replicas of half the stages; one GPU left to another process."""
    prompts, layers = depth.made_prompts(depth.prompts // 2), ",".join(map(str, depth.few))
    struck: list[float] = []

    def kill(driver: subprocess.Popen[bytes], folder: Path) -> bool:
        if len(list(folder.glob("_commits/shard-*.json"))) < 3:
            return False
        pids = sorted(stage_processes(driver.pid))
        os.kill(pids[len(pids) // 2], signal.SIGKILL)
        struck.append(time.time())
        return True

    found = run(depth, "killed", prompts, kill, layers=layers, stages=depth.stages)
    stood_s = max(later - earlier for (earlier, _), (later, _) in pairwise(found.commits) if later >= struck[0])
    loaded_s = max(stage["load_s"] for stage in found.report["stages"])
    note = f"{len(found.commits)} shards, each once; the whole command {found.wall_s:.0f} s; a stage's loading took up to {loaded_s:.1f} s of it"
    rows = [Row("a stage killed: longest time without a commit", stood_s, "s", note=note)]
    depth.record("faults", "Faults and layouts", rows)
    most = depth.layers // 2 - 1
    of_half = ",".join(str(number * most // 3) for number in range(4))
    rows.append(speed_row(f"2 replicas of {depth.stages // 2} stages over {most + 1} layers", run(
        depth, "replicas", prompts, layers=of_half, stages=depth.stages // 2, replicas=2
    )))  # fmt: skip
    depth.record("faults", "Faults and layouts", rows)
    most = depth.layers * (depth.stages - 1) // depth.stages - 1
    of_others = ",".join(str(number * most // 3) for number in range(4))
    with taken_gpu(depth.device):
        found = run(depth, "low-0", prompts, layers=of_others, device_map="balanced_low_0")
    rows += [speed_row(f"GPU 0 left to another process, {most + 1} layers on the others", found), *memory_rows("balanced_low_0", found)]
    depth.record("faults", "Faults and layouts", rows)


@contextmanager
def taken_gpu(device: str) -> Iterator[None]:
    """While another process holds nearly all of that GPU's memory."""
    context = get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold_gpu, args=(device, ready, done))
    process.start()
    try:
        assert ready.wait(120)
        yield
    finally:
        done.set()
        process.join(60)
        process.kill()


def hold_gpu(device: str, ready: Event, done: Event) -> None:
    taken = None if device == "cpu" else torch.empty(torch.cuda.mem_get_info()[0] - (8 << 30), dtype=torch.uint8, device=device)
    ready.set()
    done.wait(600)
    del taken


# -- the guide ------------------------------------------------------------------------------------------------------------


def against_guide(depth: Depth, options: argparse.Namespace) -> None:
    """Both over the first layers of the same checkpoint on the same GPUs; m2ray writes every layer's rows, the guide keeps them in memory."""
    model = real_size(depth.folder, options.depth, TINY if depth.tiny else None)
    few = make_prompts(depth.folder, model, 20 if depth.tiny else GUIDE_PROMPTS, BATCH_TOKENS)
    began = time.monotonic()
    rates: dict[int, float] = in_a_process(guide_tokens_per_s, model, few, depth.device)
    guide_s = time.monotonic() - began
    found = run(depth, "guide", depth.made_prompts(), model=model, stages=min(depth.stages, options.depth))
    note = (
        f"both at {options.depth} layers; the guide's process took {guide_s:.0f} s, loading included, for {few.num_tokens:,} tokens a size"
    )
    rows = [_against(found, size, rate, note) for size, rate in rates.items()]
    depth.record("guide", "The guide's method on the same GPUs", rows)


def _against(found: Ran, size: int, rate: float, note: str) -> Row:
    what = "m2ray extract, all layers committed as Parquet"
    return Row(
        what, found.tokens_per_s, "tokens/s", rate, f"guide, batches of {size}, nothing written:", found.tokens_per_s / rate, note=note
    )


if __name__ == "__main__":
    main()
