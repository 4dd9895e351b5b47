"""What a stage loses as an actor: the same micro-batches bare, with a run's writer in one thread, and as the only stage of a chain, in one of Ray's processes.

    python -m benchmarks.stage_as_actor FOLDER               # 6 layers at MiniMax-M2's real dimensions, on one GPU
    python -m benchmarks.stage_as_actor FOLDER --tiny        # to try the script on a CPU

Ways differ in what is taken, where it goes, how quickly the interpreter switches between threads, the writer's threads and the size of pages. Each
round runs all of them, beside a bare pass. Of each the notes say what the thread that launches layers did: the rest of its time, beside its own work, its
waits for the GPU and pinned memory, it waited for the interpreter. `--profile` looks at the gaps between kernels of two ways. Needs 50 GB of /dev/shm.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.against_guide import TINY, Prompts, make_prompts
from benchmarks.chain_on_gpus import Chains
from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.records import Row, record
from m2ray.activations.job import JOB_KEY
from m2ray.activations.writing.writer import ActivationWriter, WriterSpec
from m2ray.batches import LayerSpan, MicroBatch, PartSpec, Shard
from m2ray.bench.measuring import DiscardingStore
from m2ray.chain import actors
from m2ray.chain.actor import StageActor, concurrency_groups
from m2ray.chain.driver import Chain, ShardAttempt
from m2ray.chain.job import Job
from m2ray.chain.placement import Reservation, Room
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.model import pinned
from m2ray.model.capture import Capture, CaptureSpec
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.stage_output import StageOutput
from m2ray.parquet import column_chunks
from m2ray.storage import open_store

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what it is for
BATCH_TOKENS = 16_384
QUEUE_BYTES = 4 << 30
TIMEOUT_S = 300.0
USUAL_S = 0.005
"""Python's own interval between switches."""


@dataclass(frozen=True)
class Way:
    """How the micro-batches go through the stage.

    Attributes:
        is_chain: as the stage of a chain, or else one after the other on one thread.
        takes: whether every layer's rows are taken. keeps: whether they are stored, in memory.
        switch_s: the interpreter's interval. threads: the writer's. page_rows: of a page, where it is not the format's.
    """

    name: str
    is_chain: bool = True
    takes: bool = True
    keeps: bool = True
    switch_s: float = 0.0002
    threads: int = 8
    page_rows: int = 0


WAYS = (
    Way("one thread, nothing stored", is_chain=False, keeps=False),
    Way("one thread", is_chain=False),
    Way("actor, nothing taken", takes=False),
    Way("actor, nothing stored", keeps=False),
    Way("actor"),
    Way("actor, switches 5 ms", switch_s=USUAL_S),
    Way("actor, switches 0.05 ms", switch_s=0.00005),
    Way("actor, 4 writer threads", threads=4),
    Way("actor, pages of 1,024 rows", page_rows=1024),
)


class Discarding(WriterSpec):
    """A writer that encodes all and stores nothing."""

    def open(self, parts: Sequence[PartSpec]) -> ActivationWriter:
        return ActivationWriter(DiscardingStore(), self.run_metadata, parts, queue_bytes=self.queue_bytes, threads=self.threads)


class Probe(StageActor):
    """A stage's actor that can also be run bare and on one thread, and tells what its launching thread did."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._profile: Any = None
        self._page_rows = column_chunks.rows_of_page
        for owner, name in ((Stage, "_pass"), (Stage, "_wait_for_gpu"), (Capture, "_wait_for_room"), (pinned, "_pinned")):
            self._clock(owner, name)

    def _clock(self, owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def clocked(*arguments: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return work(*arguments)
            finally:
                self._seconds[name] += time.perf_counter() - began
                self._seconds[f"cpu{name}"] += time.thread_time() - cpu

        setattr(owner, name, clocked)

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def settle(self, way: Way, profiled: bool) -> None:  # noqa: FBT001 - a call of Ray's
        """Before a way: the interpreter's interval, the pages, and counts that begin at 0."""
        sys.setswitchinterval(way.switch_s)
        pages: Any = column_chunks
        pages.rows_of_page = (lambda _: way.page_rows) if way.page_rows else self._page_rows
        self._seconds.clear()
        self._allocations = allocations()
        if profiled:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._thread.submit(self._profile.start).result()

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def told(self) -> tuple[dict[str, float], list[str]]:
        """After it: seconds of the launching thread, new allocations of memory; and where kernels left gaps, if that was looked at."""
        found = dict(self._seconds)
        found |= {name: count - self._allocations[name] for name, count in allocations().items()}
        if self._profile is None:
            return found, []
        self._thread.submit(self._profile.stop).result()
        told, self._profile = gaps(self._profile), None
        return found, told

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def alone(self, job: Job, batches: Sequence[MicroBatch]) -> float:
        """Seconds of the micro-batches, one after the other on the thread that computes, all rows durable at the end."""
        seconds: float = self._thread.submit(one_thread_s, self._passage.stages[0], job, batches).result()
        return seconds

    @property
    def _thread(self) -> Any:
        return self._passage.compute.thread


def allocations() -> dict[str, float]:
    """Of memory that torch took from the system so far: pinned, with the seconds that took, and of the GPU."""
    if not torch.cuda.is_available():
        return {}
    host = torch.cuda.host_memory_stats()
    return {
        "pinned allocations": host["num_host_alloc"],
        "seconds of them": host.get("host_alloc_time.total", 0) / 1e6,
        "GPU allocations": torch.cuda.memory_stats().get("num_device_alloc", 0),
    }


def gaps(profile: Any) -> list[str]:
    """Of the stream with most kernels: how long they ran, how long it stood still between them, and the longest of these times."""
    events = [each for each in profile.profiler.kineto_results.events() if str(each.device_type()).endswith("CUDA")]
    streams = Counter[int]()
    for each in events:
        streams[each.device_resource_id()] += 1
    if not streams:
        return ["no kernels"]
    stream, _ = streams.most_common(1)[0]
    kernels = sorted((each.start_ns(), each.duration_ns(), each.name()[:60]) for each in events if each.device_resource_id() == stream)
    still = sorted(((after[0] - before[0] - before[1]) / 1e6, before[2], after[2]) for before, after in pairwise(kernels))
    times = Counter[str]()
    for _, duration_ns, name in kernels:
        times[name] += duration_ns
    return [
        f"{len(kernels)} kernels ran {sum(kernel[1] for kernel in kernels) / 1e6:.0f} ms of {(kernels[-1][0] - kernels[0][0]) / 1e6:.0f}",
        *(
            f"gaps above {least} ms: {sum(gap > least for gap, *_ in still)}, {sum(gap for gap, *_ in still if gap > least):.0f} ms"
            for least in (0.02, 0.2, 2)
        ),
        *(f"{gap:.2f} ms between {before} and {after}" for gap, before, after in still[:-13:-1]),
        *(f"{total_ns / 1e6:.0f} ms of {name}" for name, total_ns in times.most_common(14)),
    ]


def one_thread_s(stage: Stage, job: Job, batches: Sequence[MicroBatch]) -> float:
    """Two micro-batches under way, as in benchmarks/gpu_stage."""
    stage.begin(job.capture)
    writer = job.writer.open(stage.parts)
    under_way = deque[StageOutput]()

    def hand_over() -> None:
        output = under_way.popleft()
        if captured := output.captured:
            writer.submit("bench", output.micro_batch, captured, TIMEOUT_S)
        elif output.ready is not None:
            output.ready.synchronize()

    began = time.monotonic()
    try:
        for batch in batches:
            under_way.append(stage.forward(batch, None))
            if len(under_way) > 2:
                hand_over()
        while under_way:
            hand_over()
        for batch in batches:
            if stage.parts and batch.is_last:
                writer.collect(batch.shard, "bench", TIMEOUT_S)
        return time.monotonic() - began
    finally:
        writer.close()


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

    def seconds(self, way: Way, *, profiled: bool = False) -> tuple[float, str]:
        """Of all micro-batches, and what was told of them."""
        with tempfile.TemporaryDirectory(dir=self.memory) as folder:
            open_store(folder).put(JOB_KEY, self.job_json)
            sites = {"residual": tuple(range(self.layers))} if way.takes else {}
            writer = (WriterSpec if way.keeps else Discarding)(folder, {}, QUEUE_BYTES, way.threads)
            job = Job(CaptureSpec(sites, "bfloat16"), writer, BATCH_TOKENS)
            run = self._chain_s if way.is_chain else self._alone_s
            seconds = run(job, lambda: ray.get(self.actor.settle.remote(way, profiled), timeout=TIMEOUT_S))
            found, lines = ray.get(self.actor.told.remote(), timeout=TIMEOUT_S)
        return seconds, "\n    ".join([told(found), *lines])

    def _alone_s(self, job: Job, settle: Callable[[], None]) -> float:
        settle()
        seconds: float = ray.get(self.actor.alone.remote(job, self.prompts.batches), timeout=TIMEOUT_S)
        return seconds

    def _chain_s(self, job: Job, settle: Callable[[], None]) -> float:
        """From the moment when the stage is ready to the last shard's receipts."""
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
        return ended[-1] - ended[1]


def told(found: dict[str, float]) -> str:
    """What the launching thread did, in seconds, and what memory was taken."""
    waits = found.get("_wait_for_gpu", 0.0) + found.get("_wait_for_room", 0.0)
    own = found.get("cpu_pass", 0.0)
    rest = found.get("_pass", 0.0) - waits - own - found.get("_pinned", 0.0)
    counted = ", ".join(
        f"{name} {found[name]:.3g}" for name in ("pinned allocations", "seconds of them", "GPU allocations") if name in found
    )
    return f"launching {found.get('_pass', 0.0):.2f} s: waits for the GPU {waits:.2f}, own {own:.2f}, pinned memory {found.get('_pinned', 0.0):.2f}, the rest {rest:.2f}; {counted}"


def shard_of(batches: Sequence[MicroBatch]) -> Shard:
    ids, counts = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("sequence_ids", "token_counts"))
    return Shard(batches[0].shard, ids, counts)


def probe_class(num_take_threads: int) -> Any:
    """As m2ray.chain.actor.actor_class."""
    groups = concurrency_groups(num_take_threads)
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(Probe)


def bench(folder: Path, model: Path, layers: int, prompts: Prompts, memory: Path) -> Iterator[Bench]:
    """The stage in an actor of Ray's, until the end."""
    config = json.loads((model / "config.json").read_text())
    num_gpus = min(1, torch.cuda.device_count())
    started: Any = actors
    started.actor_class = probe_class
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ray.init(address="local", num_cpus=16, num_gpus=num_gpus, include_dashboard=False, _temp_dir=scratch, logging_level="ERROR")
        specs = [
            [StageSpec(str(model), LayerSpan(0, layers), "bfloat16", "auto", "cuda:0" if num_gpus else "cpu", 1, compile=bool(num_gpus))]
        ]
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
    parser.add_argument("--prompts", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="", help="only those whose names have one of these, with commas between them")
    parser.add_argument("--profile", action="store_true", help="gaps between kernels, of one thread and of the actor")
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.tiny else None)
    prompts = make_prompts(folder, model, options.prompts, BATCH_TOKENS)
    ways = [way for way in WAYS if any(word in way.name for word in options.ways.split(","))]
    bare = Way("bare", is_chain=False, takes=False)
    measured: dict[str, list[tuple[float, str]]] = {way.name: [] for way in (bare, *ways)}
    print(
        f"{prompts.num_tokens:,} tokens in {len(prompts.batches)} micro-batches, {sum(batch.padded_tokens for batch in prompts.batches):,} padded",
        flush=True,
    )
    for stand in bench(folder, model, options.layers, prompts, MEMORY):
        for way in (replace(bare, is_chain=True), bare, *ways[:1]):  # it loads, compiles, and takes its memory
            print(way.name, *stand.seconds(way), flush=True)
        for _ in range(options.rounds):
            for way in (bare, *ways):
                measured[way.name].append(stand.seconds(way))
                print(f"{time.strftime('%H:%M:%S')} {way.name}: {measured[way.name][-1][0]:.3f} s; {measured[way.name][-1][1]}", flush=True)
        for way in (bare, *(each for each in WAYS if each.name in ("one thread", "actor"))) if options.profile else ():
            print(f"profiled: {way.name}", *stand.seconds(way, profiled=True), sep="\n    ", flush=True)
    rows = list(rows_of(measured, prompts, bare.name))
    title = f"A stage of {options.layers} layers at MiniMax-M2's real dimensions as an actor, and without one around it"
    _ = print(*rows, sep="\n") if options.tiny else record("stage_as_actor", title, rows)


def rows_of(measured: dict[str, list[tuple[float, str]]], prompts: Prompts, bare: str) -> Iterator[Row]:
    base = statistics.median(seconds for seconds, _ in measured.pop(bare))
    for name, found in measured.items():
        seconds = statistics.median(each for each, _ in found)
        rate = prompts.num_tokens / seconds
        yield Row(name, rate, "tokens/s", prompts.num_tokens / base, "bare", base / seconds, "0.95", found[-1][1].splitlines()[0])


if __name__ == "__main__":
    main()
