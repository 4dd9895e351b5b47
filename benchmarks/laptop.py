"""`m2ray extract` with its defaults against the loop that people write (benchmarks/loop.py), on a machine without a GPU.

    python -m benchmarks.laptop FOLDER                       # 10, 60, 300 and 1,000 prompts, float32 and bfloat16, 5 alternating pairs
    python -m benchmarks.laptop FOLDER --prompts 60 --dtypes float32 --pairs 1

FOLDER gets a small trained model (scripts/trained_model) unless it has one, and what is written, of which each run deletes the one before it.
Both are processes of their own, timed from start to end, and both store each layer's rows in bfloat16. Memory is the peak of what the
process and its children hold, shared pages counted once (Pss). CPU time is that of all their threads, user's and system's, those that wait in a spin too.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.records import Row, record
from benchmarks.runs import ROOT, TIMEOUT_S, environment

TARGETS = {10: 1.5, 60: 1.2, 300: 1.0, 1000: 1.0}
MEMORY_TARGET = 1.3
MEDIAN_WORDS, SPREAD, SHORTEST, LONGEST = 60, 0.8, 4, 400
"""The prompts' lengths: log-normal, cut at both ends."""

_LOOK_S = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="print the rows and leave results/ as it is")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = trained_model(folder)
    rows = []
    for count in options.prompts:
        prompts = make_prompts(folder, count)
        for dtype in options.dtypes:
            rows += pairs_of(folder, model, prompts, count, dtype, options.pairs)
    if options.keep:
        print(*rows, sep="\n")
    else:
        record("laptop", "m2ray's defaults against the loop that people write: SmolLM2-135M, all layers' rows, no GPU", rows)


def trained_model(folder: Path) -> Path:
    model = folder / "model"
    if not model.exists():
        subprocess.run([str(ROOT / "scripts/trained_model"), str(model)], check=True, timeout=TIMEOUT_S)
    return model


def make_prompts(folder: Path, count: int) -> Path:
    """Seeded prompts of the corpus's words."""
    path = folder / f"prompts-{count}.jsonl"
    rng = np.random.default_rng(21)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_WORDS), SPREAD, count), SHORTEST, LONGEST).astype(int)
    texts = [" ".join(rng.choice(words, length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def pairs_of(folder: Path, model: Path, prompts: Path, count: int, dtype: str, pairs: int) -> list[Row]:
    """Both ways, which of a pair comes first alternating: a row of the time, one of the CPU time and one of the memory."""
    out = folder / "out"
    loop = [sys.executable, str(ROOT / "benchmarks/loop.py"), str(model), str(prompts), str(out), "--dtype", dtype]
    ours = [sys.executable, "-m", "m2ray.cli", "extract", "--model", str(model), "--prompts", str(prompts), "--output", str(out)]
    ours += ["--compute-dtype", dtype]
    times: dict[str, list[float]] = {"loop": [], "m2ray": []}
    cpus: dict[str, list[float]] = {"loop": [], "m2ray": []}
    peaks: dict[str, list[int]] = {"loop": [], "m2ray": []}
    for number in range(pairs):
        ways = [("loop", loop), ("m2ray", ours)]
        for name, command in ways if number % 2 else reversed(ways):
            shutil.rmtree(out, ignore_errors=True)
            before_s = cpu_s()
            taken_s, peak_bytes = timed(command, folder / f"{name}.log")
            cpus[name].append(cpu_s() - before_s)
            times[name].append(taken_s)
            peaks[name].append(peak_bytes)
        print(f"{count} prompts, {dtype}: {times['m2ray'][-1]:.1f} s, the loop {times['loop'][-1]:.1f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    ratios = [ours_s / loop_s for ours_s, loop_s in zip(times["m2ray"], times["loop"], strict=True)]
    note = f"median of {pairs} pairs, {min(ratios):.2f} to {max(ratios):.2f}"
    what = f"{count} prompts, {dtype}"
    return [
        compared(f"{what}: wall time", times, "s", str(TARGETS.get(count, "")), note, statistics.median(ratios)),
        compared(f"{what}: CPU time", cpus, "s", ""),
        compared(
            f"{what}: resident memory at the peak", {name: [peak / 2**20 for peak in each] for name, each in peaks.items()}, "MiB", "1.3"
        ),
    ]


def compared(what: str, found: dict[str, list[float]], unit: str, target: str, note: str = "", ratio: float | None = None) -> Row:
    ours, loop = statistics.median(found["m2ray"]), statistics.median(found["loop"])
    return Row(what, ours, unit, loop, "the loop", ratio or ours / loop, target, note)


def timed(command: list[str], log: Path, look: Callable[[int], int] | None = None) -> tuple[float, int]:
    """Seconds of a command, and the bytes that it and its children held at their peak. Raises RuntimeError with what it said if it fails."""
    look = look or pss_bytes
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, look(process.pid))
        try:
            process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() - began > TIMEOUT_S:
                process.kill()
    taken_s = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(log.read_text())
    return taken_s, peak_bytes


def cpu_s() -> float:
    """Of the children that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pss_bytes(root: int) -> int:
    """Of a process and its descendants, now: a page that several share counts once."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    num_bytes, left = 0, [root]
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        num_bytes += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return num_bytes


if __name__ == "__main__":
    main()
