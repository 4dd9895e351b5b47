"""An export to speculators against `cp` of the very files that it writes, on one core, side by side.

    python -m benchmarks.export_speed [--shards 2] [--pairs 5] [--folder FOLDER]

Both read from the page cache and write to the same disk, and both are kept to one core. The export makes every file durable before it
counts; so the copy is followed by a sync of its file system, and given without it in the note.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.records import Row, record
from benchmarks.synthetic import make_run
from m2ray.export.exporting import plan_export, write_export

LAYERS = (1, 30, 58, 61)


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp -r`, and until the file system has it on its disk."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied_s = time.perf_counter() - begin
    subprocess.run(["sync", "--file-system", str(target)], check=True)
    durable_s = time.perf_counter() - begin
    shutil.rmtree(target)
    return copied_s, durable_s


def timed_export(run: Path, target: Path) -> float:
    """Seconds of the whole export, its look at the run included."""
    begin = time.perf_counter()
    write_export(plan_export(run, "speculators"), "speculators", target)
    return time.perf_counter() - begin


def measure(folder: Path, shards: int, pairs: int) -> list[Row]:
    run, kept, target = folder / "run", folder / "kept", folder / "target"
    make_run(run, shards, layers=LAYERS, with_masks=True)
    timed_export(run, kept)  # what is copied, and the first touch of everything
    gigabytes = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) / 1e9
    taken = []
    for _ in range(pairs):
        ours_s = timed_export(run, target)
        shutil.rmtree(target)
        os.sync()
        taken.append((ours_s, *timed_copy(kept, target)))
        os.sync()
    ours_s, copied_s, durable_s = (statistics.median(each) for each in zip(*taken, strict=True))
    low, ratio, high = statistics.quantiles((durable / ours for ours, _, durable in taken), n=4)
    note = (
        f"{gigabytes:.2f} GB in {sum(1 for path in kept.rglob('*') if path.is_file()):,} files, one core; median of {pairs} pairs, quartiles "
        f"{low:.2f} to {high:.2f}; cp without sync {gigabytes / copied_s:.2f} GB/s; load of the machine {os.getloadavg()[1]:.0f}"
    )
    name = f"export to speculators, {len(LAYERS)} layers"
    return [Row(name, gigabytes / ours_s, "GB/s", gigabytes / durable_s, "cp -r of its files, and sync", ratio, "0.7", note)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on which disk; default: the temporary folder's")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # what is started from here, `cp` too, stays there
    with TemporaryDirectory(dir=options.folder) as folder:
        record("export_speed", "Exporting to a trainer", measure(Path(folder), options.shards, options.pairs))


if __name__ == "__main__":
    main()
