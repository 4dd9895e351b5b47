"""What telling Ray's metrics costs a driver: processor time of one time that all is told, by stages, as a share of the time until the next.

    python -m benchmarks.metrics_cost

The stages are made up; each has a GPU and has moved on, so that every metric has something to tell. What is told goes to Ray's own meters, in a
process that Ray has started for, whose reports go on beside it. Looks at such a run with and without telling alternate, and what is recorded is the
difference of each pair. Stages cost nothing: they are asked in any case.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

from benchmarks.pairs import median_interval
from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.chain.joining import cluster
from m2ray.chain.metrics import METRICS, Metrics
from m2ray.chain.status import GpuStatus, RunStatus, StageStatus

PERIOD_S = 2.0
LOOKS = 50
GPU = GpuStatus(0, "H200", 141 << 30, 1 << 30, 1 << 30, 1 << 30, 1 << 30, 1 << 30)
STAGE = StageStatus(LayerSpan(0, 2), "node", "cuda:0", pid=1, gpus=(GPU,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    with cluster(30.0):
        rows = [row(stages, options.pairs) for stages in (4, 16, 64)]
    if not options.no_record:
        record("metrics_cost", "What the metrics cost the driver", rows)


def row(num_stages: int, num_pairs: int) -> Row:
    """One more processor second a second of the driver's node, by the median of the pairs."""
    run = Run(num_stages)
    metrics, costs_s = Metrics("benchmark", run.look), list[float]()
    metrics.tell()
    for number in range(num_pairs):
        pair = {name: cost_s(look) for name, look in ordered({"without": run.look, "with": metrics.tell}, number)}
        costs_s.append(pair["with"] - pair["without"])
    low, high = median_interval(costs_s)
    cost = statistics.median(costs_s)
    load = os.getloadavg()[0]
    note = f"every {PERIOD_S:g} s; 95 % interval of the median {low * 1e3:.2f} to {high * 1e3:.2f} ms; {num_pairs} pairs of {LOOKS} looks; load {load:.0f}"
    what = f"{num_stages} stages with GPUs, {len(METRICS)} metrics: driver's CPU time a look"
    return Row(what, cost * 1e3, "ms", PERIOD_S * 1e3, "the time between two looks", cost / PERIOD_S, "0.01", note)


def ordered(looks: dict[str, Any], number: int) -> list[tuple[str, Any]]:
    """Which comes first alternates."""
    return list(looks.items())[:: -1 if number % 2 else 1]


def cost_s(look: Any) -> float:
    """Processor seconds of the whole process a look: Ray's threads take part."""
    began_s = time.process_time()
    for _ in range(LOOKS):
        look()
    return (time.process_time() - began_s) / LOOKS


class Run:
    """A run that moves on from look to look, so that every counter has something to tell."""

    def __init__(self, num_stages: int) -> None:
        planned: list[Any] = [type("Planned", (), {"replica": 0, "stage": stage}) for stage in range(num_stages)]
        self._planned = planned
        self._looks = 0

    def look(self) -> RunStatus:
        self._looks += 1
        now = self._looks
        stage = replace(
            STAGE,
            micro_batches=now,
            tokens=now,
            padded_tokens=2 * now,
            read_bytes=now,
            compute_s=0.1 * now,
            wait_s=0.1 * now,
            copy_s=0.1 * now,
            write_wait_s=0.1 * now,
            write_s=0.1 * now,
            store_s=0.1 * now,
            written_bytes=now,
            stored_parts=now,
        )
        stages = tuple((planned, stage) for planned in self._planned)
        return RunStatus(now, 10**6, now, 0, 10**6, 1.0, 1.0, now, stages, shards_here=now, site_bytes={"residual": now})


if __name__ == "__main__":
    main()
