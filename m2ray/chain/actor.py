"""StageActor: a thin Ray shell around one stage of the model and the consumers of what it captures: its writer, and its statistics'.

Stages call each other: one takes a micro-batch from the stage before, computes, and hands its hidden states on. The driver talks to
the first stage, which gets the micro-batches, and to the last, which knows what is complete; the others only tell it of failures.
"""

import gc
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch
from ray.exceptions import GetTimeoutError

from m2ray.activations.writing.writer import ActivationWriter, WriterSpec
from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt
from m2ray.chain.answering import Answering
from m2ray.chain.completion import Completed, Completion, GatheredShard
from m2ray.chain.cuda_ipc import Offer
from m2ray.chain.door import Door
from m2ray.chain.failure import as_memory_error
from m2ray.chain.loading import load_spans, require_gpus, require_run_folder, warm_up
from m2ray.chain.machine import peak_rss_bytes
from m2ray.chain.status import StageStatus, measure_gpus, status_here, with_layers, with_micro_batch, with_peaks, with_writer
from m2ray.chain.transport import Incoming, Outgoing, Parcel, Payload, receive, send
from m2ray.chain.turns import Turns
from m2ray.chain.wave import Entered, Gathering, compute, wave_tokens
from m2ray.config import Transport
from m2ray.errors import StoreError
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageOutput, StageSpec
from m2ray.planning.memory import MOST_BATCHES

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from m2ray.activations.writing.capture_writer import CaptureWriter

_AHEAD = 2
"""Micro-batches at each of a stage's doors, at most: received and not computed, computed and not sent, sent and not taken by the next
stage, computed and not with the writer."""

_POLL_S = 0.5

_CLOSE_S = 60.0

_WATCH_S = 60.0
"""How long a call may wait for news before it is asked again."""


class Job(NamedTuple):
    """What a loaded chain does next: what it takes, where and how that is written, and the padded tokens of a full micro-batch."""

    capture: CaptureSpec
    writer: WriterSpec
    batch_tokens: int


class StageActor:
    """Runs one span, on one device or dealt out over several.

    A micro-batch is received on one of Ray's threads when its turn comes, in the order of `step`. Then it goes through four doors, each
    with a thread of its own: it is computed, sent to the next stage, awaited until the next stage has taken it, and given to the writer.
    So none of these waits for another: while the next stage takes one over, the next is sent (cuda_ipc's one slot has to be empty first).
    Where the layers are not all ready, those that are received gather for a wave (wave.py); else each is a wave of its own.
    """

    def __init__(self, specs: Sequence[StageSpec], *, transport: Transport, timeout_s: float, epoch: int) -> None:
        """Args:
        specs: one a device, in the order of the layers.
        timeout_s: how long the driver lets a stage be silent.
        epoch: of the chain, now.
        """
        self._specs = specs
        self._devices = [torch.device(spec.device) for spec in specs]
        self._on_gpu = self._devices[0].type == "cuda"
        self._stages: list[Stage] = []
        self._job: Job | None = None
        self._writer: ActivationWriter | None = None
        self._consumers: tuple[CaptureWriter, ...] = ()
        self._answering = Answering()
        self._timeout_s = timeout_s
        # More than a wave may take, here or in the next stage, each of whose micro-batches has the watchdog's limit: the driver is the one that decides.
        self._limit_s = 2 * MOST_BATCHES * timeout_s
        self._turns = Turns(epoch)
        self._completion = Completion(self._turns)
        self._gathering = Gathering(wave_tokens(specs))
        # On a GPU `_run` returns when the computation is queued there: one more at the door suffices. While a wave runs, another comes in.
        places = wave_tokens(specs) or (1 if self._on_gpu else _AHEAD)
        self._compute = self._door("compute", places, "an earlier micro-batch to be computed")
        self._send = self._door("send", _AHEAD, "hidden states to be sent")
        self._arrive = self._door("arrive", _AHEAD, "the next stage to take hidden states over")
        self._capture = self._door("capture", _AHEAD * len(specs), "captured rows to find their way to the writer")
        self._incoming = Incoming(self._devices[0])
        self._outgoing = Outgoing(self._turns, self._devices[-1], transport, self._limit_s)
        self._successor: Any = None
        self._began_at: float | None = None
        self._loaded = self._status = status_here(specs)

    # -- beginning ----------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="collect")
    def get_ready(self, job: Job, driver_version: str) -> StageStatus:
        """`look`, `load` and `begin` in one call: each call costs the driver. What an earlier one did is not done again."""
        self.look(job.writer.output, driver_version)
        self.load()
        status: StageStatus = self.begin(job)
        return status

    def look(self, output: str, driver_version: str) -> None:
        """Refuse a node of other versions, or one that does not see the run folder. Asked first, since loading may take minutes.

        Raises:
            StoreError, RunConflictError, ClusterError: as `require_run_folder`.
        """
        require_run_folder(output, self._status.node, driver_version)

    @ray.method(concurrency_group="collect")
    def load(self) -> None:
        """Build the span from its own tensors, unless an earlier call did.

        Raises:
            CheckpointError: the span's tensors are missing or damaged, or the files are not those that the driver saw.
            StageError: torch does not see the GPUs that Ray gave.
        """
        if self._on_gpu:
            require_gpus(len(self._devices), self._status.node)
        self._compute.thread.submit(self._build).result()

    @ray.method(concurrency_group="collect")
    def begin(self, job: Job) -> StageStatus:
        """Take on a job, unless an earlier call did. `load` comes first, and nothing of an earlier job may be on its way.

        Raises:
            ConfigError: it takes what the model does not have.
            StoreError: what the one before left unfinished could not be removed.
        """
        self._compute.thread.submit(self._take_on, job).result()
        return self._status

    @ray.method(concurrency_group="control")
    def link(self, successor: Any) -> None:
        """Learn which stage follows (None: this is the last), and agree with it how hidden states travel.

        Raises:
            StageError: the way that `transport` names does not work here.
        """
        self._successor = successor
        if successor is not None:
            assert self._job is not None, "begin() comes first"
            handed_bytes = self._job.batch_tokens * self._stages[-1].handed_bytes
            sends_by = self._outgoing.connect(successor, self._status.node_id, handed_bytes, self._timeout_s)
            self._status = replace(self._status, sends_by=sends_by)

    @ray.method(concurrency_group="control")
    def connect(self, offer: Offer) -> str:
        """Map the slot of the stage before. Returns why that is impossible; "" if it is mapped."""
        return self._incoming.connect(offer, self._status.node_id)

    @ray.method(concurrency_group="control")
    def reset(self, epoch: int, attempts: Sequence[tuple[int, str]]) -> None:
        """Begin an epoch: steps count from 0 again, what is still to come of earlier ones is dropped, `attempts` are given up.

        Args:
            epoch: later than any before; the call of an earlier one comes late and does nothing.
            attempts: (shard, attempt) of all that were in flight.

        Raises:
            TimeoutError: the micro-batch that is being computed does not end.
        """
        with self._turns.changed:
            if epoch < self._turns.epoch:
                return
            self._turns.begin(epoch)
            self._completion = Completion(self._turns)
        # Also of a job that has been closed: what waits, and the last mark, would go into the next one's waves. What comes later comes behind it.
        dropped = self._compute.thread.submit(self._gathering.drop)
        if self._job is None:
            return  # it is still loading, or taking a job on, which goes on in any epoch
        self._abandon(attempts)
        for door in (self._compute, self._send, self._arrive, self._capture):
            door.drain(self._timeout_s)
        dropped.result(self._timeout_s)
        self._abandon(attempts)  # what was being computed may have opened its attempt again

    # -- a micro-batch's way ------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="take")
    def take(self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, payload: Payload | None) -> None:
        """Take one micro-batch over, as soon as there is room for it; it goes through the span and to the next stage by itself.

        `watch` tells what failed.

        Args:
            epoch: counts the failures after which the chain went on; calls of an earlier epoch end at once.
            step: this micro-batch's place in the order of its epoch, from 0 on without gaps.
            attempt: the try at the shard that the rows belong to.
            payload: what the stage before hands on, or where it lies; None for the first stage.
        """
        turns, limit_tokens = self._turns, self._gathering.limit_tokens
        size = micro_batch.padded_tokens if limit_tokens else 1
        with turns.guarded(epoch), turns.turn(epoch, step, self._limit_s), self._compute.place(epoch, size) as compute:
            with self._finding_room(micro_batch, limit_tokens if limit_tokens >= 2 * size else 0):
                boundary = None if payload is None else self._incoming.receive(epoch, payload)
            compute(self._join, Entered(step, attempt, micro_batch, boundary))

    @ray.method(concurrency_group="control", num_returns=0)
    def mark(self, epoch: int, step: int) -> None:
        """Nothing comes after `step`, which may still be on its way, before something has left the chain: no wave waits for more."""
        self._compute.thread.submit(self._begin_marked, epoch, step)
        if self._successor is not None:
            self._successor.mark.remote(epoch, step)

    def _begin_marked(self, epoch: int, step: int) -> None:
        with self._turns.guarded(epoch):
            self._turns.require(epoch)
            for wave in self._gathering.mark(step):
                self._run(epoch, wave)

    def _join(self, epoch: int, entered: Entered) -> None:
        self._turns.require(epoch)
        for wave in self._gathering.join(entered):
            self._run(epoch, wave)

    def _run(self, epoch: int, wave: list[Entered]) -> None:
        """Compute a wave, or on a GPU begin to. Whatever comes of a run of layers goes on at once: to the writer, and from the last to the next stage."""
        assert self._job is not None, "begin() comes first"
        self._began_at = self._began_at or time.monotonic()
        padded_tokens = sum(each.micro_batch.padded_tokens for each in wave) if len(wave) > 1 else 0
        turn, last = cycle([(each.step, each.attempt) for each in wave]), wave[-1].micro_batch
        computing = compute(self._stages, deque((each.micro_batch, each.boundary) for each in wave))
        wave.clear()  # the computation lets go of each boundary that it is done with
        while True:
            with self._capture.place(epoch) as capture, self._send.place(epoch) as send:
                self._turns.require(epoch)
                with self._finding_room(last, padded_tokens):
                    output, leaves = next(computing)
                step, attempt = next(turn)
                if leaves:
                    send(self._send_on, step, attempt, output)
                capture(self._give_to_writer, attempt, output, leaves)
                is_over = leaves and output.micro_batch is last
                del output  # what is computed next needs the room
            if is_over:
                return

    def _send_on(self, epoch: int, step: int, attempt: str, output: StageOutput) -> None:
        if self._successor is None:
            return
        with self._arrive.place(epoch) as arrive:
            payload = self._outgoing.payload(epoch, output)
            output.boundary = None  # whoever still waits for its rows needs it no more, and what is computed next needs the room
            arrive(self._wait_until_taken, self._successor.take.remote(epoch, step, attempt, output.micro_batch, payload))

    def _wait_until_taken(self, epoch: int, taken: Any) -> None:
        """Wait until the next stage has taken the micro-batch, or a reset. Raises what was lost on the way there."""
        self._turns.require(epoch)
        while not ray.wait([taken], timeout=_POLL_S)[0]:
            self._turns.require(epoch)
        ray.get(taken, timeout=self._limit_s)

    def _give_to_writer(self, epoch: int, attempt: str, output: StageOutput, leaves: bool) -> None:  # noqa: FBT001 - private
        assert self._writer is not None
        assert self._began_at is not None
        compute_s = output.compute_s
        computed_at = time.monotonic()
        captured = output.captured
        copied_at = time.monotonic()
        self._turns.require(epoch)
        for consumer in self._consumers if captured or leaves else ():
            consumer.submit(attempt, output.micro_batch, captured, self._timeout_s)
        since_begin_s = computed_at - self._began_at - self._writer.backlog.waited_s
        self._status = with_layers(self._status, compute_s, copied_at - computed_at, since_begin_s)
        if leaves:
            self._status = with_micro_batch(self._status, output.micro_batch)
            self._turns.finish_step(epoch)

    @ray.method(concurrency_group="answer")
    def answer(
        self, capture: CaptureSpec, micro_batch: MicroBatch, parcel: Parcel | None, followers: Sequence[Any]
    ) -> tuple[tuple[CapturedLayer, ...], Any]:
        """Compute a micro-batch of a request, between those of a job, and let the stages that follow go on with it.

        It has no place in the order of a job's micro-batches, and nothing of it is written: what fails concerns whoever asked.

        Args:
            capture: what is taken of it.
            parcel: what the stage before hands on; None for the first stage.
            followers: the stages that are still to compute.

        Returns:
            What was captured here, and the call that gives the same of the next stage, or None.
        """
        self.load()  # one that came back a moment ago
        boundary = None if parcel is None else receive(parcel, pinned=self._on_gpu)
        computed = self._compute.thread.submit(self._compute_answer, capture, micro_batch, boundary)
        try:
            outputs = computed.result(2 * self._timeout_s)
        except TimeoutError as error:
            raise GetTimeoutError(f"A request waited {2 * self._timeout_s:g} s for its turn in the {self._status.span}.") from error
        following = None
        if followers:
            handed_on = ray.put(send(outputs[-1].on_host()))
            following = followers[0].answer.remote(capture, micro_batch, handed_on, followers[1:])
        return tuple(layer for output in outputs for layer in output.captured), following

    def _compute_answer(self, capture: CaptureSpec, micro_batch: MicroBatch, boundary: Boundary | None) -> list[StageOutput]:
        with self._finding_room(micro_batch):
            return self._answering.compute(self._stages, capture, micro_batch, boundary)

    @ray.method(concurrency_group="control", num_returns=0)
    def release(self, epoch: int) -> None:
        """The next stage has fetched the hidden states that lay in this one's slot."""
        self._outgoing.release(epoch)

    @ray.method(concurrency_group="collect", num_returns=0)
    def gather(self, epoch: int, step: int, shard: int, attempt: str, receipts: tuple[PartReceipt, ...]) -> None:
        """Add this stage's receipts of a shard whose last micro-batch is `step`, once all its parts are durable, and pass them on."""
        with self._turns.guarded(epoch):
            self._turns.wait(epoch, lambda: self._turns.done > step, self._limit_s, f"the rows of micro-batch {step}")
            assert self._consumers, "begin() comes first"
            for consumer in self._consumers:
                receipts = (*receipts, *consumer.collect(shard, attempt, self._timeout_s))
            if self._successor is not None:
                self._successor.gather.remote(epoch, step, shard, attempt, receipts)
                return
            self._completion.add(epoch, GatheredShard(shard, attempt, receipts))

    # -- what the driver asks -----------------------------------------------------------------------------------------

    @ray.method(concurrency_group="watch")
    def watch(self, epoch: int) -> None:
        """Return when the epoch is over, or after a while; raise its first failure in this stage."""
        self._turns.watch(epoch, _WATCH_S)

    @ray.method(concurrency_group="watch")
    def completed(self, epoch: int, steps: int, shards: int) -> Completed:
        """Of the last stage: what is complete, as soon as it is more than `steps` micro-batches and `shards` shards, or after a while."""
        return self._completion.beyond(epoch, steps, shards, _WATCH_S)

    @ray.method(concurrency_group="control")
    def status(self) -> StageStatus:
        """How far this stage is."""
        status = replace(
            self._status,
            peak_rss_bytes=peak_rss_bytes(),
            losses=tuple(lost for stage in self._stages for lost in stage.losses()),
        )
        return status if self._writer is None else with_peaks(with_writer(status, self._writer), self._devices)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """End the job and its writers; unfinished parts are given up."""
        self._job = None
        for consumer in self._consumers:
            consumer.close(_CLOSE_S)

    def leave(self) -> None:
        """End this stage's threads, each after what it is at: of a stage that has no process of its own, which would end with it."""
        self._turns.begin(self._turns.epoch + 1)
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def threads(self) -> "list[ThreadPoolExecutor]":
        """Those behind its doors."""
        return [door.thread for door in (self._compute, self._send, self._arrive, self._capture)]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _door(self, name: str, places: int, awaited: str) -> Door:
        return Door(self._turns, name, places, awaited, self._limit_s)

    def _build(self) -> None:
        """Load the spans of all devices, unless an earlier call did: the driver misses its answer where another stage fails at that time."""
        if self._stages:
            return
        gc.collect()  # what an earlier call loaded before it failed refers to itself, and there is no room for it beside what comes now
        self._stages = load_spans(self._specs, self._status, self._tell)
        self._loaded = self._status

    def _tell(self, status: StageStatus) -> None:
        self._status = status

    def _take_on(self, job: Job) -> None:
        assert self._stages, "load() comes first"
        if job == self._job:
            return
        self.close()
        for stage, spec in zip(self._stages, self._specs, strict=True):
            stage.begin(job.capture)
            warm_up(stage, spec, job.batch_tokens, job.writer.queue_bytes // len(self._specs), self._count_warm_up)
        writer = job.writer.open([part for stage in self._stages for part in stage.parts])
        statistics = {place: kinds for stage in self._stages for place, kinds in stage.statistics.items()}
        consumers = (writer, job.writer.open_statistics(statistics)) if statistics else (writer,)
        self._began_at = None
        self._status = replace(self._loaded, gpus=measure_gpus(self._devices) if self._on_gpu else ())
        # A close that comes now, from whoever gives the job up, may not leave it begun and its writers closed: hence the job first.
        self._job, self._writer = job, writer
        self._consumers = consumers

    def _count_warm_up(self, left: int) -> None:
        self._status = replace(self._status, warm_up_left=left)

    def _abandon(self, attempts: Sequence[tuple[int, str]]) -> None:
        # What the store does not delete soon is no commit's, and goes when the run is finished; a reset has to end within `timeout_s`.
        for consumer in self._consumers:
            with suppress(StoreError):
                consumer.abandon(attempts, self._timeout_s / 4)

    @contextmanager
    def _finding_room(self, micro_batch: MicroBatch, in_wave_tokens: int = 0) -> Iterator[None]:
        """Turn a lack of memory into the error that the driver acts on, and free what this micro-batch has taken.

        Where it was in a wave of so many tokens with others, waves have half of them from here on.
        """
        try:
            yield
        except RuntimeError as error:
            memory_error = as_memory_error(error, micro_batch, self._status, in_wave_tokens)
            if memory_error is None:
                raise
            if in_wave_tokens:
                self._gathering.limit_tokens = in_wave_tokens // 2
                self._compute.resize(in_wave_tokens // 2)
            if self._on_gpu:
                torch.cuda.empty_cache()
            raise memory_error from error


def concurrency_groups(num_take_threads: int) -> dict[str, int]:
    """The threads that call a stage, by the group of the method."""
    return {"take": num_take_threads, "collect": 4, "control": 4, "watch": 4, "answer": 4}


def actor_class(num_take_threads: int) -> Any:
    """StageActor as a Ray actor class whose `take` may be entered by `num_take_threads` micro-batches at once.

    They must be more than the micro-batches in flight: Ray may hand them over out of order, and each waits its turn.
    """
    groups = concurrency_groups(num_take_threads)
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(StageActor)
