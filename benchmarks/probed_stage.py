"""A stage's actor for benchmarks/stage_as_actor: it can also be run bare and on one thread, and tells what it, its GPU and the process beside it did when."""

import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import ray
import torch

from benchmarks.probed_process import Event, events
from m2ray.activations.writing import beside
from m2ray.activations.writing.beside import WriterBeside
from m2ray.activations.writing.writer import ActivationWriter, WriterSpec
from m2ray.batches import MicroBatch, PartSpec
from m2ray.bench.measuring import DiscardingStore
from m2ray.chain.actor import StageActor, concurrency_groups
from m2ray.chain.job import Job, JobHere
from m2ray.model import pinned
from m2ray.model.capture import Capture
from m2ray.model.pinned import SharedRuns
from m2ray.model.stage import Stage
from m2ray.model.stage_output import StageOutput
from m2ray.parquet import column_chunks

TIMEOUT_S = 300.0


class Here(WriterSpec):
    """A writer in the stage's own process, which has its rows in memory that torch pins."""


class Discarding(Here):
    """A writer that encodes all and stores nothing."""

    def open(self, parts: Sequence[PartSpec]) -> ActivationWriter:
        return ActivationWriter(DiscardingStore(), self.run_metadata, parts, queue_bytes=self.queue_bytes, threads=self.threads)


class Probe(StageActor):
    """A stage's actor that can also be run bare and on one thread, and tells what its launching thread did."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        process: Any = beside
        process._MODULE = "benchmarks.probed_process"  # noqa: SLF001
        super().__init__(*arguments, **options)
        self._passes: list[tuple[float, int, Any]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._profile: Any = None
        self._page_rows = column_chunks.rows_of_page
        for owner, name in (
            (Stage, "_pass"),
            (Stage, "_wait_for_gpu"),
            (Capture, "_wait_for_room"),
            (pinned, "_pinned"),
            (SharedRuns, "_add"),
            (JobHere, "give"),
        ):
            self._clock(owner, name)

    def _take_on(self, job: Job) -> None:
        beside, memories = self._beside, [stage.row_memory for stage in self._passage.stages]
        if isinstance(job.writer, Here):
            self._beside = None
            for stage in self._passage.stages:
                stage.row_memory = None
        try:
            super()._take_on(job)
        finally:
            self._beside = beside
            for stage, memory in zip(self._passage.stages, memories, strict=True):
                stage.row_memory = memory

    def _clock(self, owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            since = time.monotonic()
            try:
                done = work(*arguments, **options)
                if name == "_pass":
                    self._passes.append((since, arguments[1].num_tokens, done[0]._timed))  # noqa: SLF001
                return done
            finally:
                if name in ("_pass", "give"):
                    events.append(("stage", name, since, time.monotonic(), time.thread_time() - cpu))
                self._seconds[name] += time.perf_counter() - began
                self._seconds[f"cpu{name}"] += time.thread_time() - cpu
                self._seconds[f"end{name}"] = time.monotonic()

        setattr(owner, name, clocked)

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def settle(self, switch_s: float, page_rows: int, profiled: bool) -> None:  # noqa: FBT001 - a call of Ray's
        """Before a way: the interpreter's interval, a page's rows (0: the format's), and counts that begin at 0."""
        sys.setswitchinterval(switch_s)
        pages: Any = column_chunks
        pages.rows_of_page = (lambda _: page_rows) if page_rows else self._page_rows
        self._seconds.clear()
        self._passes.clear()
        events.clear()
        self._allocations = allocations()
        if profiled:
            kinds = torch.profiler.ProfilerActivity
            self._profile = torch.profiler.profile(activities=[kinds.CUDA if torch.cuda.is_available() else kinds.CPU])
            self._thread.submit(self._profile.start).result()

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def told(self) -> tuple[dict[str, float], list[str]]:
        """After it: seconds of the launching thread, new allocations of memory; and where kernels left gaps, if that was looked at."""
        found = dict(self._seconds)
        found |= {name: count - self._allocations[name] for name, count in allocations().items()}
        job = self._passage.job
        writer = [] if job is None else [f"writer: {job._writer.figures}"]  # noqa: SLF001 - as the stage is asked for them
        if self._profile is None:
            return found, writer
        self._thread.submit(self._profile.stop).result()
        told, self._profile = gaps(self._profile), None
        return found, [*writer, *told]

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def timeline(self, began: float, ended: float, last_s: float) -> list[str]:
        """What the GPU did from the beginning to the end, by time.monotonic; and what all threads that have to do with rows did in the last seconds."""
        job = self._passage.job
        found = [*events]
        if job is not None and isinstance(job._writer, WriterBeside):  # noqa: SLF001
            found += job._writer._process.call(job._writer._number, "timeline", (), TIMEOUT_S)  # type: ignore[union-attr]  # noqa: SLF001
        noted = sorted((Event(*each) for each in found if each[2] > began), key=lambda event: event.began)
        return [*gpu_times(self._passes, began, ended), *means(noted), *late(noted, ended, last_s)]

    @ray.method(concurrency_group="collect")  # type: ignore[untyped-decorator]
    def alone(self, job: Job, batches: Sequence[MicroBatch], is_warmed: bool) -> float:  # noqa: FBT001 - a call of Ray's
        """Seconds of the micro-batches, one after the other on the thread that computes, all rows durable at the end."""
        stage = self._passage.stages[0]
        if is_warmed:
            stage.begin(job.capture)
            self._thread.submit(stage.warm_up, job.batch_tokens).result()
            self._passes.clear()
            self._seconds.clear()
        seconds: float = self._thread.submit(one_thread_s, stage, job, batches).result()
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


def means(noted: Sequence[Event]) -> Iterator[str]:
    """What a call of each kind took, and was at work itself."""
    for what in dict.fromkeys(event.what for event in noted):
        calls = [event for event in noted if event.what == what]
        seconds, cpu_s = sum(call.ended - call.began for call in calls), sum(call.cpu_s for call in calls)
        yield f"{len(calls)} x {what}: {1000 * seconds / len(calls):.2f} ms, at work {1000 * cpu_s / len(calls):.2f}"


def late(noted: Sequence[Event], ended: float, last_s: float) -> Iterator[str]:
    """What was done in the last seconds, by which thread."""
    for each in noted:
        if each.ended > ended - last_s and each.what != "write_pieces":
            since, until = (1000 * (at - ended) for at in (each.began, each.ended))
            yield f"{since:7.1f} to {until:7.1f} ms, at work {1000 * each.cpu_s:5.1f}: {each.thread} {each.what}"


def gpu_times(passes: Sequence[tuple[float, int, Any]], began: float, ended: float) -> list[str]:
    """Of the passes of micro-batches, each with when it was launched from on, how long the GPU was at them and stood still between them."""
    if not passes:
        return []
    start = 1000 * (passes[0][0] - began)
    if passes[0][2].end is None:
        return [f"{start:.1f} ms until the first pass"]
    first = passes[0][2]._begin  # noqa: SLF001 - its own
    times = [(first.elapsed_time(timed._begin), first.elapsed_time(timed.end)) for _, _, timed in passes]  # noqa: SLF001
    between = sorted(((after[0] - before[1], number) for number, (before, after) in enumerate(pairwise(times), 1)), reverse=True)
    rest = 1000 * (ended - began) - start - times[-1][1]
    return [
        f"{start:.1f} ms until the first launch, {sum(end - begin for begin, end in times):.1f} in passes, {sum(gap for gap, _ in between):.1f} between them, {rest:.1f} after the last",
        "longest between: " + ", ".join(f"{gap:.2f} before {number}" for gap, number in between[:6]),
        "passes (tokens: ms on the GPU, launched ms before its begin): "
        + ", ".join(
            f"{tokens}: {end - begin:.1f}, {begin - 1000 * (since - passes[0][0]):.1f}"
            for (since, tokens, _), (begin, end) in zip(passes, times, strict=True)
        ),
    ]


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


def probe_class(num_take_threads: int) -> Any:
    """As m2ray.chain.actor.actor_class."""
    groups = concurrency_groups(num_take_threads)
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(Probe)
