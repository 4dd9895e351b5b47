"""What a stage loses as an actor: the same micro-batches bare, with a run's writer in one thread, and as the only stage of a chain, in one of Ray's processes
with the one beside it that writes.

    python -m benchmarks.stage_as_actor FOLDER               # 6 layers at MiniMax-M2's real dimensions, on one GPU
    python -m benchmarks.stage_as_actor FOLDER --compute-dtype float8
    python -m benchmarks.stage_as_actor FOLDER --tiny        # to try the script on a CPU

Ways differ in what is taken, where it goes, which process writes it, who makes CRCs, how quickly the interpreter switches between threads, the writer's threads and
the size of pages. Each round runs all of them, beside a bare pass. Of each the notes say what the thread that launches layers did: the rest of its time, beside its own work, its
waits for the GPU and pinned memory, it waited for the interpreter. `--profile` looks at the gaps between kernels of one thread and of the actor, where these are
among the ways, and `--timeline` at what which thread did in the last seconds. Needs 50 GB of /dev/shm.
"""

import argparse
import json
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.against_guide import TINY, Prompts, make_prompts
from benchmarks.chain_on_gpus import Chains
from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.probed_stage import TIMEOUT_S, Discarding, Here, probe_class
from benchmarks.records import Row, record
from m2ray.activations.job import JOB_KEY
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch, Shard
from m2ray.chain import actors
from m2ray.chain.driver import Chain, ShardAttempt
from m2ray.chain.job import Job
from m2ray.chain.placement import Reservation, Room
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec
from m2ray.storage import open_store

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what it is for
BATCH_TOKENS = 16_384
QUEUE_BYTES = 4 << 30
USUAL_S = 0.005
"""Python's own interval between switches."""


@dataclass(frozen=True)
class Way:
    """How the micro-batches go through the stage.

    Attributes:
        is_chain: as the stage of a chain, or else one after the other on one thread.
        takes: whether every layer's rows are taken. keeps: whether they are stored, in memory. is_beside: whether in
            the process beside. by_gpu: whether the GPU makes rows' CRCs.
        switch_s: the interpreter's interval. threads: the writer's. page_rows: of a page, where it is not the format's. is_warmed: whether the
            GPU has been at work before, as a chain's has that begins a job: one that has stood still is faster for a while.
    """

    name: str
    is_chain: bool = True
    takes: bool = True
    keeps: bool = True
    is_beside: bool = True
    by_gpu: bool = True
    switch_s: float = 0.0002
    threads: int = 8
    page_rows: int = 0
    is_warmed: bool = False


BARE = Way("bare", is_chain=False, takes=False)

WAYS = (
    Way("bare, warmed up", is_chain=False, takes=False, is_warmed=True),
    Way("one thread, nothing stored", is_chain=False, keeps=False, is_beside=False),
    Way("one thread", is_chain=False, is_beside=False),
    Way("actor, nothing taken", takes=False),
    Way("actor, nothing stored", keeps=False, is_beside=False),
    Way("actor"),
    Way("actor, CRCs by the process", by_gpu=False),
    Way("actor, writer in the stage's process", is_beside=False),
    Way("actor, writer and CRCs in the stage's process", is_beside=False, by_gpu=False),
    Way("actor, switches 5 ms", switch_s=USUAL_S),
    Way("actor, switches 0.05 ms", switch_s=0.00005),
    Way("actor, 4 writer threads", threads=4),
    Way("actor, writer and CRCs in the stage's process, pages of 1,024 rows", is_beside=False, by_gpu=False, page_rows=1024),
)


@dataclass(frozen=True)
class Bench:
    """One loaded stage, and what goes through it."""

    stages: Stages
    actor: Any
    prompts: Prompts
    job_json: bytes
    layers: int
    hidden_bytes: int
    memory: Path

    def seconds(self, way: Way, *, profiled: bool = False, last_s: float = 0.0) -> tuple[float, str]:
        """Of all micro-batches, and what was told of them, with a timeline of the last seconds."""
        with tempfile.TemporaryDirectory(dir=self.memory) as folder:
            open_store(folder).put(JOB_KEY, self.job_json)
            sites = {"residual": tuple(range(self.layers))} if way.takes else {}
            kind = (WriterSpec if way.is_beside else Here) if way.keeps else Discarding
            writer = kind(folder, {}, QUEUE_BYTES, way.threads)
            job = Job(CaptureSpec(sites, "bfloat16", with_crcs=way.by_gpu), writer, BATCH_TOKENS)
            run = self._chain_s if way.is_chain else partial(self._alone_s, is_warmed=way.is_warmed)
            seconds, ended = run(job, lambda: ray.get(self.actor.settle.remote(way.switch_s, way.page_rows, profiled), timeout=TIMEOUT_S))
            found, lines = ray.get(self.actor.told.remote(), timeout=TIMEOUT_S)
            if last_s:
                lines += ray.get(self.actor.timeline.remote(ended - seconds, ended, last_s), timeout=TIMEOUT_S)
        return seconds, "\n    ".join([told(found, ended), *lines])

    def _alone_s(self, job: Job, settle: Callable[[], None], *, is_warmed: bool) -> tuple[float, float]:
        settle()
        seconds: float = ray.get(self.actor.alone.remote(job, self.prompts.batches, is_warmed), timeout=TIMEOUT_S)
        return seconds, time.monotonic()

    def _chain_s(self, job: Job, settle: Callable[[], None]) -> tuple[float, float]:
        """From the moment when the stage is ready to the last shard's receipts, and when that was."""
        self.stages.begin(job)
        shards = {number: list(batches) for number, batches in groupby(self.prompts.batches, lambda batch: batch.shard)}
        queue, ended = ShardQueue(map(shard_of, shards.values())), [0.0]
        limits: dict[str, Any] = {"in_flight_bytes": 16 << 30, "hidden_bytes": self.hidden_bytes, "timeout_s": TIMEOUT_S}

        def batches_of(shard: Shard, _: int) -> Iterator[MicroBatch]:
            if ended == [0.0]:
                settle()
                ended.append(time.monotonic())
            return iter(shards[shard.index])

        def take(result: ShardAttempt) -> None:
            ended.append(time.monotonic())
            queue.finish(result.shard)

        runner = threading.Thread(target=Chain(self.stages, batches_of, BATCH_TOKENS, print, **limits).run, args=(queue, take))
        runner.start()
        runner.join(TIMEOUT_S)
        assert queue.is_finished, "the chain failed, and said why above"
        return ended[-1] - ended[1], ended[-1]


def told(found: dict[str, float], ended: float) -> str:
    """What the launching thread did, in seconds, how long before the end it was done, and the writer had all rows; and what memory was taken."""
    waits = found.get("_wait_for_gpu", 0.0) + found.get("_wait_for_room", 0.0)
    own = found.get("cpu_pass", 0.0)
    pinning = found.get("_pinned", 0.0) + found.get("_add", 0.0)
    rest = found.get("_pass", 0.0) - waits - own - pinning
    counted = ", ".join(
        f"{name} {found[name]:.3g}" for name in ("pinned allocations", "seconds of them", "GPU allocations") if name in found
    )
    before = ", ".join(
        f"{what} {ended - found[name]:.3f} s" for name, what in (("end_pass", "launched"), ("endgive", "given")) if name in found
    )
    return f"launching {found.get('_pass', 0.0):.2f} s: waits for the GPU {waits:.2f}, own {own:.2f}, pinned memory {pinning:.2f}, the rest {rest:.2f}; before the end {before}; {counted}"


def shard_of(batches: Sequence[MicroBatch]) -> Shard:
    ids, counts = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("sequence_ids", "token_counts"))
    return Shard(batches[0].shard, ids, counts)


def bench(folder: Path, model: Path, layers: int, prompts: Prompts, memory: Path, dtype: str) -> Iterator[Bench]:
    """The stage in an actor of Ray's, until the end."""
    config = json.loads((model / "config.json").read_text())
    num_gpus = min(1, torch.cuda.device_count())
    started: Any = actors
    started.actor_class = probe_class
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ray.init(address="local", num_cpus=16, num_gpus=num_gpus, include_dashboard=False, _temp_dir=scratch, logging_level="ERROR")
        specs = [[StageSpec(str(model), LayerSpan(0, layers), dtype, "auto", "cuda:0" if num_gpus else "cpu", 1, compile=bool(num_gpus))]]
        node = ray.nodes()[0]
        reservation = Reservation([Room(node["NodeManagerAddress"], node["NodeID"], num_gpus, 1.0)], {})
        reservation.wait(60.0)
        of_chain = actors.Actors(specs, reservation, "auto", TIMEOUT_S, 60.0)
        stages = Stages(specs, of_chain, timeout_s=TIMEOUT_S)
        stages.start()
        job = Chains(model, config["vocab_size"], layers, num_gpus)._job()  # noqa: SLF001 - a record of no prompts
        yield Bench(stages, of_chain.handles[0], prompts, job.to_json(), layers, 2 * config["hidden_size"], memory)
        stages.close()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1536], help="of one pass; more numbers: other passes of the same stage")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compute-dtype", choices=("bfloat16", "float8"), default="bfloat16")
    parser.add_argument("--ways", default="", help="only those in whose names this pattern is found: 'actor$|CRCs'")
    parser.add_argument(
        "--profile", action="store_true", help="gaps between kernels, of one thread and of the actor, where they are among the ways"
    )
    parser.add_argument(
        "--timeline", type=float, default=0.0, help="of the last round: what which thread did in the last seconds of each way"
    )
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.tiny else None)
    passes = [make_prompts(folder, model, count, BATCH_TOKENS) for count in options.prompts]
    ways = [way for way in WAYS if re.search(options.ways, way.name)]
    profiled = [way for way in ways if way.name in ("one thread", "actor")] if options.profile else []
    rows: list[Row] = []
    for stand in bench(folder, model, options.layers, passes[0], MEMORY, options.compute_dtype):
        writing = [way for way in ways if way.takes and way.keeps]
        for way in (
            replace(BARE, is_chain=True),
            BARE,
            *writing[:1],
        ):  # it loads, compiles, and takes its memory, and files do for the first time
            print(way.name, *stand.seconds(way), flush=True)
        for prompts in passes:
            name = "" if prompts is passes[0] else f", {len(prompts.texts):,} prompts"
            rows += measured(replace(stand, prompts=prompts), ways, name, options.rounds, options.timeline)
        in_float8 = options.compute_dtype == "float8"
        title = f"A stage of {options.layers} layers at MiniMax-M2's real dimensions as an actor, and without one around it{', in float8' if in_float8 else ''}"
        _ = print(*rows, sep="\n") if options.tiny else record("stage_as_actor" + ("_float8" if in_float8 else ""), title, rows)
        for way in profiled:
            print(f"profiled: {way.name}", *stand.seconds(way, profiled=True), sep="\n    ", flush=True)


def measured(stand: Bench, ways: Sequence[Way], name: str, rounds: int, last_s: float) -> Iterator[Row]:
    """Of each way the median beside that of bare passes in the same rounds; `name` says of which prompts. Of the last round what was done in the last seconds is told."""
    prompts = stand.prompts
    padded_tokens = sum(batch.padded_tokens for batch in prompts.batches)
    print(f"{prompts.num_tokens:,} tokens in {len(prompts.batches)} micro-batches, {padded_tokens:,} padded", flush=True)
    found: dict[str, list[tuple[float, str]]] = {way.name: [] for way in (BARE, *ways)}
    for number in range(rounds):
        for way in (BARE, *ways):
            seconds, told_of_it = stand.seconds(way, last_s=last_s if number == rounds - 1 else 0.0)
            found[way.name].append((seconds, told_of_it))
            print(f"{time.strftime('%H:%M:%S')} {way.name}{name}: {seconds:.3f} s; {told_of_it}", flush=True)
    base, *of_ways = (statistics.median(seconds for seconds, _ in found[way.name]) for way in (BARE, *ways))
    for way, seconds in zip(ways, of_ways, strict=True):
        rates = prompts.num_tokens / seconds, prompts.num_tokens / base
        yield Row(
            f"{way.name}{name}", rates[0], "tokens/s", rates[1], "bare", base / seconds, "0.95", found[way.name][-1][1].splitlines()[0]
        )


if __name__ == "__main__":
    main()
