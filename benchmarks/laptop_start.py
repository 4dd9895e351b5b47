"""The start of `m2ray extract` on a machine without a GPU: when each of its lines comes, and how soon a wrong option or path is told.

    git archive BASE | tar -x -C /tmp/base                   # a checkout to compare with
    python -m benchmarks.laptop_start FOLDER --base /tmp/base

FOLDER as of benchmarks.laptop. Each checkout runs 10 prompts in one stage and in two, and a wrong option and wrong paths, in turns, each a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.laptop import make_prompts, trained_model
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, TIMEOUT_S, environment

PHASES = {
    "start": "the first word",
    "check": "torch and transformers are imported",
    "survey": "options and model are looked at, prompts are read",
    "load": "the machine is looked at, stages are started",
    "extract": "the model is loaded, rows are computed",
}
"""What is done once the first line of each phase comes."""

WRONG = {"a wrong option": ["--modle", "x"], "absent paths": ["--model", "none", "--prompts", "none.jsonl"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, help="the checkout before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="print the rows and leave results/ as it is")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model, prompts = trained_model(folder), make_prompts(folder, 10)
    checkouts = [ROOT, *([options.base.resolve()] if options.base else [])]
    found: dict[Path, dict[str, list[float]]] = {checkout: {} for checkout in checkouts}
    for _ in range(options.rounds):
        for checkout in checkouts:
            for what, seconds in lines_of(checkout, model, prompts):
                found[checkout].setdefault(what, []).append(seconds)
    rows = [row(what, taken, found[checkouts[-1]].get(what) if options.base else None) for what, taken in found[ROOT].items()]
    if options.keep:
        print(*rows, sep="\n")
    else:
        record("laptop_start", "The start of m2ray extract on a laptop, in seconds from its begin", rows)


def row(what: str, taken_s: list[float], before_s: list[float] | None) -> Row:
    value, before = statistics.median(taken_s), statistics.median(before_s) if before_s else None
    target = "1 s" if what.endswith("the first word") or what in WRONG else ""
    note = f"{len(taken_s)} times, {min(taken_s):.1f} to {max(taken_s):.1f} s"
    return Row(what, value, "s", before, "before" if before else "", value / before if before else None, target, note)


def lines_of(checkout: Path, model: Path, prompts: Path) -> list[tuple[str, float]]:
    """Of each kind of start what came when."""
    found = [
        (what, timed(checkout, ["--output", "run", "--model", str(model), "--prompts", str(prompts), *more])[-1][1])
        for what, more in WRONG.items()
    ]
    for stages in (1, 2):
        with TemporaryDirectory() as out:
            words = ["--model", str(model), "--prompts", str(prompts), "--output", out, "--stages", str(stages)]
            lines = timed(checkout, words)
        of = "one stage" if stages == 1 else "two stages"
        first = {phase: next(seconds for line, seconds in lines if line.startswith(f"{phase}:")) for phase in PHASES}
        found += [(f"{of}: {PHASES[phase]}", seconds) for phase, seconds in first.items()]
        times = [0.0, *(seconds for _, seconds in lines if seconds <= first["extract"])]
        found.append(
            (
                f"{of}: the longest time without a line until then",
                max(after - before for before, after in pairwise(times)),
            )
        )
    return found


def timed(checkout: Path, words: list[str]) -> list[tuple[str, float]]:
    """Each line of `m2ray extract` with the seconds from its begin; "" for its end."""
    began = time.monotonic()
    command = [sys.executable, "-u", "-m", "m2ray.cli", "extract", *words]
    with subprocess.Popen(command, cwd=checkout, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = [(line, time.monotonic() - began) for line in process.stdout]
        process.wait(TIMEOUT_S)
    return [*lines, ("", time.monotonic() - began)]


if __name__ == "__main__":
    main()
