"""`m2ray extract` from an FP8 checkpoint to Parquet on one GPU, against each limit measured beside it, and against `m2ray plan`.

    python -m benchmarks.extract_on_gpu FOLDER               # 6 layers at MiniMax-M2's real dimensions
    python -m benchmarks.extract_on_gpu FOLDER --tiny        # to try the script on a CPU

One run measures: the machine's profile (`m2ray bench`); the extraction onto the local disk and into memory (/dev/shm, where a disk does
not bind); the same bytes written and synced as plainly as can be; and the bare forward pass of the same micro-batches. The least of
the limits is what the extraction is held against. Needs 24.5 GB of disk for the checkpoint and 16 GB for the run, and 32 GB of /dev/shm.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_guide import LONGEST, TINY, Prompts, make_prompts, written_bytes_per_s
from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, environment, extract
from m2ray.batches import LayerSpan
from m2ray.model.stage import StageSpec, load_stage
from m2ray.planning.profile import Profile

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what it is for
WRITE_THREADS = (1, 8)


@dataclass(frozen=True)
class Extracted:
    """One extraction: its report.json, the sizes of its parts, and what its file system took of the same bytes, plainly written."""

    report: dict[str, Any]
    part_bytes: list[int]
    raw_bytes_per_s: float

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
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.tiny else None)
    few, many = (make_prompts(folder, model, count, options.batch_tokens) for count in (options.prompts, 2 * options.prompts))
    profile = measured_profile(folder, model, options.batch_tokens)
    hidden_size = int(json.loads((model / "config.json").read_text())["hidden_size"])
    rows: list[Row] = []
    bare = bare_tokens_per_s(model, many, options)
    for name, parent, prompts in (("the local disk", folder, few), ("memory (/dev/shm)", MEMORY, many)):
        if shutil.disk_usage(parent).free < 1.2 * prompts.num_tokens * options.layers * 6200:
            print(f"{parent} has no room for the run: left out")
            continue
        found = extracted(parent, folder, model, prompts, options)
        captured_bytes = 2 * hidden_size * options.layers
        rows += rows_of(
            name, found, limits(found, profile, bare, captured_bytes, options.layers), predicted(folder, model, prompts, found, options)
        )
        # After each: a machine's time may end before the next is done.
        title = f"m2ray extract of {options.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint to Parquet, on one GPU"
        _ = print(*rows, sep="\n") if options.tiny else record("extract_on_gpu", title, rows)


def measured_profile(folder: Path, model: Path, batch_tokens: int) -> Profile:
    path, store = folder / "profile.json", folder / "bench"
    command = [sys.executable, "-m", "m2ray.cli", "bench", str(model), "--output", str(store), "--profile", str(path)]
    subprocess.run([*command, "--batch-tokens", str(batch_tokens)], env=environment(), cwd=ROOT, check=True, timeout=300)
    shutil.rmtree(store, ignore_errors=True)
    return Profile.from_json(path.read_bytes())


def bare_tokens_per_s(model: Path, prompts: Prompts, options: argparse.Namespace) -> float:
    """Real tokens a second of the layers alone: nothing captured, nothing sent, the micro-batches those of the extraction."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    span, on_gpu = LayerSpan(0, options.layers), device != "cpu"
    stage = load_stage(
        StageSpec(str(model), span, (), ("residual",), "bfloat16", "bfloat16", "auto", device, None, compile=on_gpu), lambda *_: None
    )
    stage.warm_up(options.batch_tokens)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        outputs = [stage.forward(batch, None) for batch in prompts.batches]
        if outputs[-1].ready is not None:
            outputs[-1].ready.synchronize()
        seconds.append(time.monotonic() - began)
    del stage, outputs
    free()
    return prompts.num_tokens / sorted(seconds)[1]


def extracted(parent: Path, folder: Path, model: Path, prompts: Prompts, options: argparse.Namespace) -> Extracted:
    """Extract below `parent`, look at what was written, delete it, and write as many bytes plainly."""
    scratch = Path(tempfile.mkdtemp(prefix="m2ray-extract-", dir=parent))
    log = folder / "extract.log"
    log.unlink(missing_ok=True)
    try:
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
        return Extracted(report, part_bytes, max(written_bytes_per_s(scratch, part_bytes, threads) for threads in WRITE_THREADS))
    finally:
        shutil.rmtree(scratch)


def limits(found: Extracted, profile: Profile, bare: float, captured_bytes: int, num_parts: int) -> dict[str, float]:
    """Tokens a second that each resource allows by itself. `captured_bytes` are a token's; a writer thread takes whole parts."""
    allowed = {"computation": bare, "store": found.raw_bytes_per_s / found.token_bytes}
    allowed["encoder"] = profile.encode_bytes_per_s * min(profile.writer_threads, num_parts) / captured_bytes
    if profile.copy_bytes_per_s is not None:
        allowed["device_to_host_copy"] = profile.copy_bytes_per_s / captured_bytes
    return allowed


def predicted(folder: Path, model: Path, prompts: Prompts, found: Extracted, options: argparse.Namespace) -> float:
    """Tokens a second by `m2ray plan --profile`, the store's rate stated as it was measured."""
    words = {"model": model, "prompts": prompts.path, "profile": folder / "profile.json", "batch-tokens": options.batch_tokens, "stages": 1}
    words |= {"max-length": 4 * LONGEST, "truncation": "cut", "store-gb-per-s": found.raw_bytes_per_s / 1e9}
    command = [
        sys.executable,
        "-m",
        "m2ray.cli",
        "plan",
        "--json",
        *(text for name, value in words.items() for text in (f"--{name}", str(value))),
    ]
    done = subprocess.run(command, env=environment(), cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    rates = json.loads(done.stdout)["rates"]
    return float(rates["limits"][rates["limiting"]] * (rates["filled_share"] or 1.0))


def rows_of(store: str, found: Extracted, allowed: Mapping[str, float], prediction: float) -> list[Row]:
    report, rate = found.report, found.tokens_per_s
    least = min(allowed, key=lambda name: allowed[name])
    (stage,) = report["stages"]
    told = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(allowed.items(), key=lambda item: item[1]))
    note = (
        f"limits in tokens/s, each measured alone: {told}; report.json names {report['limiting_resource']['measured']}; "
        f"{report['tokens']:,} tokens, {sum(found.part_bytes) / 1e9:.1f} GB in {len(found.part_bytes)} parts in {report['extract_s']:.1f} s: "
        f"compute {stage['compute_s']:.1f} s, blocked by the writer {stage['write_wait_s']:.1f} s, "
        f"encode {stage['write_s'] - stage['store_s']:.1f} s and store {stage['store_s']:.1f} s on all threads"
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
