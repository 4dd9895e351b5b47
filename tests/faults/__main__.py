"""`scripts/faults`: strike runs with faults for so many minutes, and say what came of it. Exit code 1 if anything was wrong."""

import argparse
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator

from benchmarks.records import Row, record
from tests.faults.alerts import watch
from tests.faults.faults import FAULTS
from tests.faults.rounds import Tally
from tests.faults.suite import play


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long new rounds are begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="PATTERN", help="faults whose names this regular expression matches")
    parser.add_argument("--without-s3", action="store_true", help="local runs only: no S3 server is started")
    parser.add_argument("--waves", action="store_true", help="drivers take turns: layers packed and in waves, and ready")
    parser.add_argument("--alerts", action="store_true", help="instead of rounds: a real Prometheus, and a store that hangs")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/faults.json, or faults_in_waves.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    if arguments.alerts:
        problems = watch()
        for problem in problems:
            print(f"PROBLEM {problem}")
        sys.exit(1 if problems else 0)
    began = time.monotonic()
    tally = play(arguments.seed, 60 * arguments.minutes, with_s3=not arguments.without_s3, only=arguments.only, in_waves=arguments.waves)
    report(tally, time.monotonic() - began, write=("faults_in_waves" if arguments.waves else "faults") if arguments.record else "")
    sys.exit(1 if tally.problems else 0)


def report(tally: Tally, seconds: float, *, write: str) -> None:
    """Print the figures, what drivers stopped with and every problem; write the record of that name, "" for none."""
    rows = [*_rows(tally, seconds), *_rows_of_faults(tally)]
    for row in rows:
        print(f"{row.what}: {row.value:g} {row.unit}. {row.note}")
    for name, errors in tally.errors.items():
        for error, count in errors.items():
            print(f"stopped after {name}: {count} x {error}")
    for problem in tally.problems:
        print(f"PROBLEM {problem}")
    if write:
        title = "Faults: runs that are struck again and again" + (", in waves" if write == "faults_in_waves" else "")
        record(write, title, rows, command=shlex.join(["scripts/faults", *sys.argv[1:]]))


def _rows(tally: Tally, seconds: float) -> list[Row]:
    return [
        Row(
            "runs that ended with the rows of an undisturbed one",
            tally.equal_rounds,
            "runs",
            baseline=tally.rounds,
            baseline_is="struck",
            target="all",
            note=f"{tally.shards} shards, {tally.drivers} drivers, {seconds / 60:.0f} minutes with start and end",
        ),
        Row("problems", len(tally.problems), "problems", target="none", note="of rows, files, accounts, processes, messages and readers"),
        Row("processes and nodes killed", tally.kills, "kills", target="200 in an hour"),
        Row("looks of the reader at runs at work", tally.polls, "polls", note=f"{tally.refused_polls} more found the store gone"),
        Row(
            "shards tried again after a failure of stages or store",
            sum(tally.tried_again),
            "shards",
            note=f"in {len(tally.tried_again)} failures, at most {max(tally.tried_again, default=0)} at a time",
        ),
    ]


def _rows_of_faults(tally: Tally) -> Iterator[Row]:
    for name in (fault.name for fault in FAULTS if tally.strikes[fault.name]):
        recoveries_s, note = tally.recoveries_s[name], f"stopped the driver {tally.stops[name]} times"
        if recoveries_s:
            note += f"; {statistics.median(recoveries_s):.1f} s to the next commit (median of {len(recoveries_s)})"
        yield Row(name, tally.strikes[name], "strikes", note=note)


if __name__ == "__main__":
    main()
