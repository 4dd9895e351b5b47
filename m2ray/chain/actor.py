"""StageActor: a thin Ray shell around one stage of the model (model/stage.py), a micro-batch's way through it (passage.py) and its job (job.py).

Stages call each other: one takes a micro-batch from the stage before, computes, and hands its hidden states on. The driver talks to
the first stage, which gets the micro-batches, and to the last, which knows what is complete; the others only tell it of failures.
"""

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m2ray.model.interpreter import quick_switches, without_collector

with without_collector():  # a worker of Ray's begins with this file
    import ray
    import torch

    from m2ray.activations.writing.beside import Beside
    from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt
    from m2ray.chain.completion import Completed, Completion, GatheredShard
    from m2ray.chain.cuda_ipc import Offer
    from m2ray.chain.job import Job, JobHere
    from m2ray.chain.loading import Refusals, load_spans, require_gpus, require_run_folder, warm_up
    from m2ray.chain.machine import peak_rss_bytes, unshared_bytes
    from m2ray.chain.passage import Passage
    from m2ray.chain.status import StageStatus, measure_gpus, status_here
    from m2ray.chain.transport import Parcel, Payload, receive, send
    from m2ray.chain.turns import Turns
    from m2ray.model.capture import CaptureSpec
    from m2ray.model.pinned import SharedRuns
    from m2ray.model.stage import StageSpec
    from m2ray.option_types import Transport

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_WATCH_S = 60.0
"""How long a call may wait for news before it is asked again."""


class StageActor:
    """Runs one span, on one device or dealt out over several: it loads, takes on one job after the other, and answers requests.

    What becomes of a micro-batch is in passage.py.
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
        self._timeout_s = timeout_s
        self._turns = Turns(epoch)
        self._completion = Completion(self._turns)
        self._status = status_here(specs)
        """Of what it does beside jobs."""
        self._passage = Passage(specs, self._turns, self._status, transport, timeout_s)
        self._refusals = Refusals()
        # On a CPU rows lie in the stage's own memory, and layers take as long as they take.
        self._beside = Beside() if self._on_gpu else None
        self._beside_peak_bytes = 0
        self._switches = ExitStack()
        self._switches.enter_context(quick_switches())  # between its computation and its writer

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
        self._passage.compute.thread.submit(self._build).result()

    @ray.method(concurrency_group="collect")
    def begin(self, job: Job) -> StageStatus:
        """Take on a job, unless an earlier call did. `load` comes first, and nothing of an earlier job may be on its way.

        Raises:
            ConfigError: it takes what the model does not have.
            StoreError: what the one before left unfinished could not be removed.
        """
        self._passage.compute.thread.submit(self._take_on, job).result()
        status: StageStatus = self.status()
        return status

    @ray.method(concurrency_group="control")
    def link(self, successor: Any) -> None:
        """Learn which stage follows (None: this is the last), and agree with it how hidden states travel.

        Raises:
            StageError: the way that `transport` names does not work here.
        """
        self._passage.successor = successor
        if successor is not None:
            job = self._passage.job
            assert job is not None, "begin() comes first"
            handed_bytes = job.batch_tokens * self._passage.stages[-1].handed_bytes
            job.sends_by(self._passage.outgoing.connect(successor, self._status.node_id, handed_bytes, self._timeout_s))

    @ray.method(concurrency_group="control")
    def connect(self, offer: Offer) -> str:
        """Map the slot of the stage before. Returns why that is impossible; "" if it is mapped."""
        return self._passage.incoming.connect(offer, self._status.node_id)

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
        self._passage.empty(attempts)

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
        self._passage.take(epoch, step, attempt, micro_batch, payload)

    @ray.method(concurrency_group="control", num_returns=0)
    def mark(self, epoch: int, step: int) -> None:
        """Nothing comes after `step`, which may still be on its way, before something has left the chain: no wave waits for more."""
        self._passage.mark(epoch, step)
        if self._passage.successor is not None:
            self._passage.successor.mark.remote(epoch, step)

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
        outputs = self._passage.answer(capture, micro_batch, boundary)
        following = None
        if followers:
            handed_on = ray.put(send(outputs[-1].on_host()))
            following = followers[0].answer.remote(capture, micro_batch, handed_on, followers[1:])
        return tuple(layer for output in outputs for layer in output.captured), following

    @ray.method(concurrency_group="control", num_returns=0)
    def release(self, epoch: int) -> None:
        """The next stage has fetched the hidden states that lay in this one's slot."""
        self._passage.outgoing.release(epoch)

    @ray.method(concurrency_group="collect", num_returns=0)
    def gather(self, epoch: int, step: int, shard: int, attempt: str, receipts: tuple[PartReceipt, ...]) -> None:
        """Add this stage's receipts of a shard whose last micro-batch is `step`, once all its parts are durable, and pass them on."""
        with self._turns.guarded(epoch):
            self._turns.wait(epoch, lambda: self._turns.done > step, self._passage.limit_s, f"the rows of micro-batch {step}")
            job = self._passage.job
            assert job is not None, "begin() comes first"
            receipts = (*receipts, *job.collect(shard, attempt, self._timeout_s))
            if self._passage.successor is not None:
                self._passage.successor.gather.remote(epoch, step, shard, attempt, receipts)
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
        job = self._passage.job
        status = self._status if job is None else job.status(self._devices)
        losses = tuple(lost for stage in self._passage.stages for lost in stage.losses())
        if self._beside is not None and self._beside.pid is not None:  # the rows that both map are the stage's
            self._beside_peak_bytes = max(self._beside_peak_bytes, unshared_bytes(self._beside.pid))
        return replace(status, peak_rss_bytes=peak_rss_bytes() + self._beside_peak_bytes, losses=losses)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """End the job and its writers; unfinished parts are given up."""
        job = self._passage.job  # the computing thread may take the next one on meanwhile
        if job is not None:
            job.close()

    def leave(self) -> None:
        """End this stage's threads, each after what it is at: of a stage that has no process of its own, which would end with it."""
        self._turns.begin(self._turns.epoch + 1)
        for thread in self._passage.threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for stage in self._passage.stages:
            if stage.row_memory is not None:
                stage.row_memory.close()  # registered and freed, it would be in the way of what comes to lie there
        if self._beside is not None:
            self._beside.close()
        self._switches.close()

    @property
    def threads(self) -> "list[ThreadPoolExecutor]":
        """Those behind its doors, and those of its job."""
        job = self._passage.job
        return [*self._passage.threads, *(job.threads if job is not None else ())]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Load the spans of all devices, unless an earlier call did: the driver misses its answer where another stage fails at that time."""
        if self._passage.stages:
            return
        gc.collect()  # what an earlier call loaded before it failed refers to itself, and there is no room for it beside what comes now
        if self._beside is not None:
            self._beside.start()  # it imports meanwhile
        with self._refusals.heeded(self._specs[0]):
            stages = load_spans(self._specs, self._status, self._tell)
        if self._beside is not None:
            for stage, device in zip(stages, self._devices, strict=True):
                stage.row_memory = SharedRuns(self._beside.memory, device)
        self._passage.stages = stages

    def _tell(self, status: StageStatus) -> None:
        self._status = status

    def _take_on(self, job: Job) -> None:
        stages, before = self._passage.stages, self._passage.job
        assert stages, "load() comes first"
        if before is not None and not before.is_closed and before.is_of(job):
            return
        self.close()
        self._passage.job = None
        for stage, spec in zip(stages, self._specs, strict=True):
            stage.begin(job.capture)
            warm_up(stage, spec, job.batch_tokens, job.writer.queue_bytes // len(self._specs), self._count_warm_up)
        loaded = replace(self._status, warm_up_left=0, gpus=measure_gpus(self._devices) if self._on_gpu else ())
        self._passage.begin(JobHere(job, stages, loaded, self._beside))

    def _count_warm_up(self, left: int) -> None:
        self._status = replace(self._status, warm_up_left=left)


def concurrency_groups(num_take_threads: int) -> dict[str, int]:
    """The threads that call a stage, by the group of the method."""
    return {"take": num_take_threads, "collect": 4, "control": 4, "watch": 4, "answer": 4}


def actor_class(num_take_threads: int) -> Any:
    """StageActor as a Ray actor class whose `take` may be entered by `num_take_threads` micro-batches at once.

    They must be more than the micro-batches in flight: Ray may hand them over out of order, and each waits its turn.
    """
    groups = concurrency_groups(num_take_threads)
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(StageActor)
