"""What the driver itself costs, by stages and replicas: the real Chain, Replicas and Stages, with stages that do nothing.

    python -m benchmarks.driver_cost

All stages of a replica are handles of one real actor, so that the driver makes all its real Ray calls for hundreds of stages on a small
machine; what the stages say to each other is not the driver's. One micro-batch passes every 90 ms, and a shard leaves 62 receipts.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from benchmarks.records import Row, record
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch, PartReceipt, Shard
from m2ray.chain.actors import Actors
from m2ray.chain.completion import Completed, GatheredShard
from m2ray.chain.driver import Chain, ShardAttempt
from m2ray.chain.job import Job
from m2ray.chain.replicas import Replicas
from m2ray.chain.stages import Stages
from m2ray.chain.status import StageStatus
from m2ray.chain.stopping import Stop
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec

PERIOD_S = 0.09
SHARE = 0.05
SEQUENCES, LENGTH = 32, 512
MICRO_BATCHES_A_SHARD = 2
"""A shard at the defaults: twice 16,384 tokens."""

RECEIPTS = tuple(
    PartReceipt(
        0, "0" * 12, "residual", layer, f"data/site=residual/layer={layer:03d}/shard-000000-{'0' * 12}.parquet", 1, 1, "0" * 16, "0" * 32
    )
    for layer in range(62)
)
_WATCH_S = 60.0


class NoStage:
    """Answers for all the stages of a replica: what the first one takes is complete when its time has come."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._began_at: float | None = None
        self._steps = 0
        self._shards: list[GatheredShard] = []
        self._told = 0
        self._changed = asyncio.Condition()

    async def get_ready(self, job: Job, driver_version: str) -> StageStatus:
        return StageStatus(LayerSpan(0, 1), "", "")

    async def status(self) -> StageStatus:
        return StageStatus(LayerSpan(0, 1), "", "")

    async def link(self, successor: Any) -> None:
        """Nothing is handed on."""

    async def watch(self, epoch: int) -> None:
        await asyncio.sleep(_WATCH_S)

    @ray.method(num_returns=0)  # type: ignore[untyped-decorator]
    async def take(self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, payload: None) -> None:
        self._began_at = self._began_at or time.monotonic()
        await asyncio.sleep(max(0.0, self._began_at + step * self._period_s - time.monotonic()))
        async with self._changed:
            self._steps += 1
            self._changed.notify_all()

    @ray.method(num_returns=0)  # type: ignore[untyped-decorator]
    async def gather(self, epoch: int, step: int, shard: int, attempt: str, receipts: tuple[PartReceipt, ...]) -> None:
        async with self._changed:
            self._shards.append(GatheredShard(shard, attempt, RECEIPTS))
            self._changed.notify_all()

    async def completed(self, epoch: int, steps: int, shards: int) -> Completed:
        async with self._changed:
            del self._shards[: shards - self._told]
            self._told = shards
            await self._changed.wait_for(lambda: self._steps > steps or self._shards)
            return Completed(self._steps, tuple(self._shards))


REMOTE_NO_STAGE: Any = ray.remote(num_cpus=0, max_concurrency=10_000)(NoStage)


class NoStages(Stages):
    """The real driver's side of the stages, over shared actors."""

    def __init__(self, num_stages: int, actor: Any) -> None:
        specs = [(StageSpec("", LayerSpan(index, index + 1), "bfloat16", "auto", "cpu", None),) for index in range(num_stages)]
        actors = Actors(specs, None, "auto", 60.0, 60.0)  # type: ignore[arg-type]
        super().__init__(specs, actors, timeout_s=60.0)
        self.begin(Job(CaptureSpec({}, "bfloat16"), WriterSpec("", {}, 0, 1), SEQUENCES * LENGTH))
        actors.handles = [actor] * num_stages

    def close(self) -> None:
        """The actors are ended by whoever started them."""


class TimedChain(Chain):
    """Knows the CPU time of its own thread: Python code, of which one thread runs at a time."""

    python_s = 0.0

    def run(self, queue: Any, on_result: Callable[[ShardAttempt], None]) -> None:
        began = time.thread_time()
        super().run(queue, on_result)
        self.python_s = time.thread_time() - began


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds a micro-batch: of the whole driver process, and of its Python threads."""

    process_ms: float
    python_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--micro-batches", type=int, default=60, help="of each replica")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true", help="print the rows only")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", object_store_memory=1 << 30)
    try:
        measure(1, 1, 10)  # starts Ray's workers
        rows = []
        for replicas in options.replicas:
            for stages in options.stages:
                costs = [measure(stages, replicas, options.micro_batches) for _ in range(options.repeats)]
                rows.append(row(stages, replicas, costs))
                print(rows[-1], flush=True)
    finally:
        ray.shutdown()
    if not options.no_record:
        record("driver_cost", "The driver's own cost, with stages that do nothing", rows)


def row(stages: int, replicas: int, costs: list[Cost]) -> Row:
    process_ms, python_ms = (statistics.median(getattr(cost, name) for cost in costs) for name in ("process_ms", "python_ms"))
    note = f"{process_ms / stages * 1e3:.0f} us a stage; Python {python_ms:.2f} ms"
    note += f"; the process takes {replicas * process_ms / PERIOD_S / 1e3:.2f} of a core"
    share = process_ms / 1e3 / PERIOD_S
    what = f"{stages} stages x {replicas} replicas: driver's CPU time a micro-batch"
    return Row(what, process_ms, "ms", PERIOD_S * 1e3, "a micro-batch's", share, f"{SHARE}", note)


def measure(num_stages: int, num_replicas: int, num_micro_batches: int) -> Cost:
    """Run the chains over as many shards as give each replica its micro-batches."""
    actors = [REMOTE_NO_STAGE.remote(PERIOD_S) for _ in range(num_replicas)]
    all_stages = [NoStages(num_stages, actor) for actor in actors]
    limits: dict[str, Any] = {"in_flight_bytes": 1 << 40, "hidden_bytes": 3072 * 2, "timeout_s": 60.0}
    chains = [(TimedChain(stages, micro_batches, SEQUENCES * LENGTH, print, **limits), stages) for stages in all_stages]
    ids = np.arange(MICRO_BATCHES_A_SHARD * SEQUENCES)
    num_shards = num_micro_batches * num_replicas // MICRO_BATCHES_A_SHARD
    shards = [Shard(index, ids, np.full(len(ids), LENGTH, np.int32)) for index in range(num_shards)]
    ray.get([actor.status.remote() for actor in actors])
    began_cpu = time.process_time()
    done = sum(1 for _ in Replicas(chains, shards, Stop(), print).results(lambda: None))
    process_s = time.process_time() - began_cpu
    for actor in actors:
        ray.kill(actor)
    assert done == num_shards
    batches = num_shards * MICRO_BATCHES_A_SHARD
    python_s = sum(chain.python_s for chain, _ in chains)
    return Cost(process_s / batches * 1e3, python_s / batches * 1e3)


def micro_batches(shard: Shard, _: int) -> Iterator[MicroBatch]:
    token_ids_BT = np.zeros((SEQUENCES, LENGTH), np.int32)
    for index in range(MICRO_BATCHES_A_SHARD):
        ids = shard.sequence_ids[index * SEQUENCES : (index + 1) * SEQUENCES]
        counts = shard.token_counts[: len(ids)]
        yield MicroBatch(shard.index, index, index == MICRO_BATCHES_A_SHARD - 1, ids, counts, token_ids_BT)


if __name__ == "__main__":
    main()
