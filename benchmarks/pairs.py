"""One benchmark in two checkouts, run alternately: how fast this one is, with the base as one.

    python -m benchmarks.pairs BASE NAME [--pairs 15] [--target 0.98] [--here "--check none"] [--record] [-- ARGUMENTS OF THE BENCHMARK]

BASE is another checkout, such as a `git worktree` of the commit before. Each run is a process of its own, started with `python -m
benchmarks.NAME` in its checkout; which of a pair comes first alternates. What is compared is the first row that a run records. The
interval of the median is that of order statistics: it holds whatever the distribution.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from math import comb
from pathlib import Path

from benchmarks.records import Row, record

HERE = Path(__file__).parent.parent
TIMEOUT_S = 600.0
TIMES = ("s", "ms", "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("base", type=Path)
    parser.add_argument("name", help="a module of benchmarks/ that records rows")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--target", default="0.98", help="of the base's speed")
    parser.add_argument("--here", default="", metavar="ARGUMENTS", help="of this checkout's benchmark alone")
    parser.add_argument(
        "--record", action="store_true", help="keep the row in results/pairs_NAME.json, or with --here in pairs_NAME_here.json"
    )
    ours = [*itertools.takewhile(lambda word: word != "--", sys.argv[1:])]
    options, arguments = parser.parse_args(ours), sys.argv[len(ours) + 2 :]
    more = {HERE: shlex.split(options.here), options.base.resolve(): []}
    ratios = []
    for number in range(options.pairs):
        found = {tree: first_row(tree, options.name, [*arguments, *more[tree]]) for tree in order(options.base.resolve(), number)}
        here, base = found[HERE], found[options.base.resolve()]
        ratios.append(base.value / here.value if here.unit in TIMES else here.value / base.value)
        print(f"pair {number + 1}: {ratios[-1]:.3f} ({here.value:.4g} against {base.value:.4g} {here.unit})", flush=True)
    low, high = median_interval(ratios)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=options.base, capture_output=True, text=True, check=True)
    note = f"95 % interval of the median: {low:.3f} to {high:.3f}; {len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f}"
    row = Row(
        here.what,
        statistics.median(ratios),
        "of the base's speed",
        1.0,
        f"commit {commit.stdout.strip()}",
        statistics.median(ratios),
        options.target,
        note,
    )
    print(f"{row.what}: {row.value:.3f} of the base's speed; {note}")
    if options.record:
        command = ["python", "-m", "benchmarks.pairs", "BASE", options.name, "--pairs", str(options.pairs)]
        command += [*(["--here", options.here] if options.here else []), "--", *arguments]
        title = f"benchmarks.{options.name}, this checkout{f' with {options.here}' if options.here else ''} against another"
        record(f"pairs_{options.name}{'_here' if options.here else ''}", title, [row], shlex.join(command))


def order(base: Path, number: int) -> tuple[Path, Path]:
    return (base, HERE) if number % 2 else (HERE, base)


def first_row(tree: Path, name: str, arguments: list[str]) -> Row:
    """Run the benchmark in a checkout, and take what it records out of its results again."""
    results = tree / "benchmarks" / "results" / f"{name}.json"
    page = tree / "benchmarks" / "README.md"
    before = {path: path.read_bytes() for path in (results, page)}
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *arguments],
            cwd=tree,
            env=environment,
            check=True,
            timeout=TIMEOUT_S,
            stdout=subprocess.DEVNULL,
        )
        row = Row(**json.loads(results.read_text())["rows"][0])
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    return row


def median_interval(values: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with 95 %; all values where there are too few."""
    ordered, count = sorted(values), len(values)
    for skipped in reversed(range(count // 2)):
        if 2 * sum(comb(count, below) for below in range(skipped + 1)) / 2**count <= 0.05:
            return ordered[skipped], ordered[count - 1 - skipped]
    return ordered[0], ordered[-1]


if __name__ == "__main__":
    main()
