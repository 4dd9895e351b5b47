"""`m2ray extract` from an FP8 checkpoint to Parquet on one GPU: against each limit measured beside it, the guide, and `m2ray plan`.

    python -m benchmarks.extract_on_gpu FOLDER               # 6 layers at MiniMax-M2's real dimensions
    python -m benchmarks.extract_on_gpu FOLDER --tiny        # to try the script on a CPU

One run measures: the machine's profile (`m2ray bench`); the guide's method (benchmarks/guide.py), which writes nothing; the bare forward
pass of the same micro-batches; the extraction onto the local disk and into memory (/dev/shm, where a disk does not bind); and, before and
after it, files of the same sizes written and synced as plainly as can be. The least of the limits is what the extraction is held against.
Needs 24.5 GB of disk for the checkpoint and 16 GB for the run, and 32 GB of /dev/shm. `--no-guide` leaves the guide out, a third of the time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.against_guide import LONGEST, TINY, Prompts, loaded_guide, make_prompts, rates_of_the_guide
from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, environment, extract, planned
from m2ray.batches import LayerSpan
from m2ray.model.stage import StageSpec, load_stage
from m2ray.planning.profile import Profile

STORES = {"disk": "the local disk", "memory": "memory (/dev/shm)"}
MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what it is for
WRITE_THREADS = 8
RAW_BYTES = 16 * 10**9
"""At least what a run writes: some virtual disks take blocks that were never written at half the rate. So as much is written and deleted
before anything is measured, and profile, run and plain writing find like blocks."""
GUIDE_BATCHES = (3, 8)
GUIDE_PROMPTS = 256
ALONE_S = 300.0
BENCH_S = 120.0
"""What `m2ray bench` may take."""


@dataclass(frozen=True)
class Extracted:
    """One extraction: its report.json, the sizes of its parts, and what its file system took before and after of plainly written bytes."""

    report: dict[str, Any]
    part_bytes: list[int]
    raw_rates: tuple[float, float]

    @property
    def raw_bytes_per_s(self) -> float:
        """The better of the two."""
        return max(self.raw_rates)

    @property
    def tokens_per_s(self) -> float:
        return float(self.report["tokens_per_s"]["measured"])

    @property
    def token_bytes(self) -> float:
        """On the disk, a token."""
        return sum(self.part_bytes) / float(self.report["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--prompts", type=int, default=1536, help="for the disk; twice as many for memory, which takes less time")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--no-guide", action="store_true")
    parser.add_argument("--only", choices=STORES, help="one of the two stores")
    parser.add_argument("--profile", type=Path, help="what `m2ray bench` has measured on this machine; else it is run")
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.tiny else None)
    few, many = (make_prompts(folder, model, count, options.batch_tokens) for count in (options.prompts, 2 * options.prompts))
    if not options.tiny and options.only != "memory":
        print(f"the disk takes {written_bytes_per_s(folder, 64 * [RAW_BYTES // 64]) / 1e9:.2f} GB/s for the first time", flush=True)
    if options.profile is None:
        options.profile = folder / "profile.json"
        measure_profile(options.profile, folder, model, options.batch_tokens)
    profile = Profile.from_json(options.profile.read_bytes())
    hidden_size = int(json.loads((model / "config.json").read_text())["hidden_size"])
    rows = [Row("m2ray bench", profile.elapsed_s, "s", BENCH_S, "two minutes:", profile.elapsed_s / BENCH_S, "under two minutes")]
    device = "cuda:0" if torch.cuda.device_count() else "cpu"
    guide: dict[int, float] = {}
    if not options.no_guide:
        guide_prompts = few if options.tiny else make_prompts(folder, model, GUIDE_PROMPTS, options.batch_tokens)
        guide = alone(guide_tokens_per_s, model, guide_prompts, device)
    bare, first = alone(bare_tokens_per_s, model, many, options.layers, options.batch_tokens, device)
    print(f"bare forward {bare:,.0f} tokens/s ({first:,.0f} while every shape was new), the guide {guide}", flush=True)
    for store, parent, prompts in (("disk", folder, few), ("memory", MEMORY, many)):
        if options.only not in (None, store):
            continue
        name = STORES[store]
        if shutil.disk_usage(parent).free < 1.2 * prompts.num_tokens * options.layers * 6200:
            print(f"{parent} has no room for the run: left out")
            continue
        found = extracted(parent, folder, model, prompts, options)
        captured_bytes = 2 * hidden_size * options.layers
        rows += against_guide_rows(name, found, guide)
        rows += rows_of(
            name,
            found,
            limits(found, profile, bare, captured_bytes),
            predicted(model, prompts, found, options, is_disk=store == "disk"),
        )
        # After each: a machine's time may end before the next is done.
        title = f"m2ray extract of {options.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint to Parquet, on one GPU"
        _ = print(*rows, sep="\n") if options.tiny else record("extract_on_gpu", title, rows)


def measure_profile(path: Path, folder: Path, model: Path, batch_tokens: int) -> None:
    store = folder / "bench"
    command = [sys.executable, "-m", "m2ray.cli", "bench", str(model), "--output", str(store), "--profile", str(path)]
    subprocess.run([*command, "--batch-tokens", str(batch_tokens)], env=environment(), cwd=ROOT, check=True, timeout=300)
    shutil.rmtree(store, ignore_errors=True)


def alone(step: Callable[..., Any], *arguments: object) -> Any:
    """What `step` returns, run in a process of its own: what it held on the GPU is gone with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(step, *arguments).result(ALONE_S)


def guide_tokens_per_s(model: Path, prompts: Prompts, device: str) -> dict[int, float]:
    """The guide's rates by prompts in a batch, once each; every layer's rows end in host memory."""
    return rates_of_the_guide(loaded_guide(model, device), prompts, GUIDE_BATCHES, 1)


def bare_tokens_per_s(model: Path, prompts: Prompts, num_layers: int, batch_tokens: int, device: str) -> tuple[float, float]:
    """Real tokens a second of the layers alone: nothing captured, nothing sent, the micro-batches those of the extraction.

    The median of three passes over all of them, and the first one, to which every shape is new.
    """
    span, compiled = LayerSpan(0, num_layers), device != "cpu"
    spec = StageSpec(str(model), span, "bfloat16", "auto", device, None, compile=compiled)
    stage = load_stage(spec, lambda *_: None)
    stage.warm_up(batch_tokens)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        for batch in prompts.batches:
            output = stage.forward(batch, None)
        if output.ready is not None:
            output.ready.synchronize()
        seconds.append(time.monotonic() - began)
    return prompts.num_tokens / sorted(seconds)[1], prompts.num_tokens / seconds[0]


def extracted(parent: Path, folder: Path, model: Path, prompts: Prompts, options: argparse.Namespace) -> Extracted:
    """Extract below `parent`, look at what was written and delete it; write such files plainly before and after."""
    hidden_size = int(json.loads((model / "config.json").read_text())["hidden_size"])
    tokens_of = Counter[int]()
    for batch in prompts.batches:
        tokens_of[batch.shard] += batch.num_tokens
    expected = [tokens * 2 * hidden_size for tokens in tokens_of.values() for _ in range(options.layers)]
    scratch = Path(tempfile.mkdtemp(prefix="m2ray-extract-", dir=parent))
    log = folder / "extract.log"
    log.unlink(missing_ok=True)
    try:
        before = written_bytes_per_s(scratch, expected)
        run = scratch / "run"
        words: dict[str, object] = {
            "model": model,
            "prompts": prompts.path,
            "output": run,
            "stages": 1,
            "batch_tokens": options.batch_tokens,
        }
        extract(log, **words, max_length=4 * LONGEST, truncation="cut")
        report = json.loads((run / "report.json").read_text())
        assert report["tokens"] == prompts.num_tokens, "both must see the same tokens"
        part_bytes = [path.stat().st_size for path in run.rglob("shard-*.parquet")]
        shutil.rmtree(run)
        return Extracted(report, part_bytes, (before, written_bytes_per_s(scratch, expected)))
    finally:
        shutil.rmtree(scratch)


def written_bytes_per_s(folder: Path, sizes: list[int]) -> float:
    """Files of these sizes, each written and synced, several at a time; at most RAW_BYTES of them. Deletes them."""
    block = np.random.default_rng(3).bytes(16 << 20)
    chosen = list(_up_to(sizes, RAW_BYTES))

    def write(job: tuple[int, int]) -> None:
        fd = os.open(folder / f"raw-{job[0]}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            left = job[1]
            while left:
                left -= os.write(fd, memoryview(block)[: min(left, len(block))])
            os.fsync(fd)
        finally:
            os.close(fd)

    os.sync()
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        began = time.monotonic()
        list(pool.map(write, enumerate(chosen)))
        seconds = time.monotonic() - began
    for path in folder.glob("raw-*"):
        path.unlink()
    return sum(chosen) / seconds


def _up_to(sizes: list[int], limit_bytes: int) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        if total > limit_bytes and total > size:
            return
        yield size


def limits(found: Extracted, profile: Profile, bare: float, captured_bytes: int) -> dict[str, float]:
    """Tokens a second that each resource allows by itself. `captured_bytes` are a token's."""
    allowed = {"computation": bare, "store": found.raw_bytes_per_s / found.token_bytes}
    allowed["encoder"] = profile.encoder_bytes_per_s(with_crcs=True) * profile.writer_threads / captured_bytes
    if profile.copy_bytes_per_s is not None:
        allowed["device_to_host_copy"] = profile.copy_bytes_per_s / captured_bytes
    return allowed


def predicted(model: Path, prompts: Prompts, found: Extracted, options: argparse.Namespace, *, is_disk: bool) -> float:
    """Tokens a second by `m2ray plan --profile`. The profile knows the disk; of any other store the rate is stated, as it was measured."""
    words: dict[str, object] = {"model": model, "prompts": prompts.path, "profile": options.profile, "batch_tokens": options.batch_tokens}
    words |= {"stages": 1, "max_length": 4 * LONGEST, "truncation": "cut"}
    if not is_disk:
        words["store_gb_per_s"] = found.raw_bytes_per_s / 1e9
    plan = planned(**words)
    return float(plan["output"]["tokens"] / plan["rates"]["duration_s"])


def against_guide_rows(store: str, found: Extracted, guide: Mapping[int, float]) -> list[Row]:
    """For each of the guide's batches; the disk's own limit is in the row about limits."""
    what = f"committed as Parquet in {store}, against the guide"
    limit = found.raw_bytes_per_s / found.token_bytes
    return [
        Row(
            what,
            found.tokens_per_s,
            "tokens/s",
            rate,
            f"guide, batches of {size}, nothing written:",
            found.tokens_per_s / rate,
            "4, or the store's own limit",
            f"the store's own limit is {limit / rate:.2f} of the guide's rate",
        )
        for size, rate in guide.items()
    ]


def rows_of(store: str, found: Extracted, allowed: Mapping[str, float], prediction: float) -> list[Row]:
    report, rate = found.report, found.tokens_per_s
    least = min(allowed, key=lambda name: allowed[name])
    (stage,) = report["stages"]
    told = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(allowed.items(), key=lambda item: item[1]))
    note = (
        f"limits in tokens/s, each measured alone: {told}; report.json names {report['limiting_resource']['measured']}; "
        f"{report['tokens']:,} tokens, {sum(found.part_bytes) / 1e9:.1f} GB in {len(found.part_bytes)} parts in {report['extract_s']:.1f} s: "
        f"compute {stage['compute_s']:.1f} s, blocked by the writer {stage['write_wait_s']:.1f} s, "
        f"encode {stage['write_s'] - stage['store_s']:.1f} s and store {stage['store_s']:.1f} s on all threads; "
        f"plain writing {found.raw_rates[0] / 1e9:.2f} GB/s before and {found.raw_rates[1] / 1e9:.2f} GB/s after"
    )
    return [
        Row(
            f"m2ray extract into {store}",
            rate,
            "tokens/s",
            allowed[least],
            f"the least limit, {least}:",
            rate / allowed[least],
            "0.8",
            note,
        ),
        Row(f"predicted by m2ray plan --profile, {store}", prediction, "tokens/s", rate, "measured:", prediction / rate, "0.85 to 1.15"),
    ]


if __name__ == "__main__":
    main()
