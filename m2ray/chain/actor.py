"""StageActor: a thin Ray shell around one stage of the model and the writer of what it captures."""

import os
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from m2ray.activations.schema import Compression
from m2ray.activations.writer import ActivationWriter
from m2ray.batches import LayerSpan, MicroBatch, PartReceipt
from m2ray.chain import transport
from m2ray.chain.report import GpuMeasured
from m2ray.errors import StageError, StageMemoryError, StoreError
from m2ray.model.stage import Stage, StageOutput, StageSpec, load_stage
from m2ray.storage import open_store

_AHEAD = 2
"""Micro-batches whose rows the writer has not got yet, at most: one that computes, one whose rows are on their way."""

_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
"""torch has no class of its own for it on a CPU."""


@dataclass(frozen=True)
class WriterSpec:
    """Where and how a stage writes: the run folder, what every part's footer says, and the writer's bounds.

    `batch_tokens` are the padded tokens of a full micro-batch.
    """

    output: str
    run_metadata: Mapping[str, str]
    queue_bytes: int
    threads: int
    timeout_s: float
    batch_tokens: int
    compression: Compression = "none"


@dataclass(frozen=True)
class StageStatus:
    """What a stage has done so far. Times are sums over its micro-batches; report.py says what each of them is."""

    span: str
    node: str
    device: str
    node_id: str = ""
    pid: int = 0
    ready: bool = False
    needed_bytes: int = 0
    read_bytes: int = 0
    parameter_bytes: int = 0
    load_s: float = 0.0
    micro_batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    copy_s: float = 0.0
    write_wait_s: float = 0.0
    write_s: float = 0.0
    written_bytes: int = 0
    peak_rss_bytes: int = 0
    gpus: tuple[GpuMeasured, ...] = ()


class StageActor:
    """Runs one span, on one device or dealt out over several.

    Ray calls `forward` on several threads, so that one micro-batch is received or handed on while another computes. Computing
    itself is done on one thread, in the order of `step`; a second one waits for captured rows and gives them to the writer.
    """

    def __init__(self, specs: Sequence[StageSpec], writer: WriterSpec, *, hands_on: bool, epoch: int) -> None:
        """Args:
        specs: one a device, in the order of the layers.
        hands_on: whether another stage follows.
        epoch: of the chain, now.
        """
        self._specs = specs
        self._writer_spec = writer
        self._hands_on = hands_on
        self._devices = [torch.device(spec.device) for spec in specs]
        self._on_gpu = self._devices[0].type == "cuda"
        self._dtype: torch.dtype = getattr(torch, specs[0].compute_dtype)
        self._stages: list[Stage] = []
        self._writer: ActivationWriter | None = None
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._capture = ThreadPoolExecutor(1, thread_name_prefix="capture")
        self._uncollected = threading.BoundedSemaphore(_AHEAD)
        self._turn = threading.Condition()
        self._next_step = 0
        self._epoch = epoch
        self._began_at: float | None = None
        span = LayerSpan(specs[0].span.start, specs[-1].span.stop)
        devices = ", ".join(spec.device for spec in specs)
        self._status = StageStatus(str(span), ray.util.get_node_ip_address(), devices, ray.get_runtime_context().get_node_id(), os.getpid())

    @ray.method(concurrency_group="collect")
    def load(self) -> StageStatus:
        """Build the span, reading only its own tensors.

        Raises:
            CheckpointError: the span's tensors are missing or damaged.
            StoreError: the run folder of the driver is not visible from this node.
            StageError: torch does not see the GPUs that Ray gave.
        """
        begin = time.monotonic()
        store = open_store(self._writer_spec.output)
        if store.size("job.json") is None:
            raise StoreError(
                f"{store.url} on node {self._status.node} has no job.json, though the driver wrote it.",
                "Give an output folder on a disk that all nodes share.",
            )
        if self._on_gpu and torch.cuda.device_count() < len(self._devices):
            raise StageError(
                f"Ray gave {len(self._devices)} GPUs on node {self._status.node}, torch {torch.__version__} sees {torch.cuda.device_count()}.",
                "Install torch for the driver's CUDA there; `m2ray doctor` tells more.",
            )
        self._stages = self._compute.submit(lambda: [self._load(spec) for spec in self._specs]).result()
        self._writer = ActivationWriter(
            store,
            self._writer_spec.run_metadata,
            [part for stage in self._stages for part in stage.parts],
            queue_bytes=self._writer_spec.queue_bytes,
            threads=self._writer_spec.threads,
            compression=self._writer_spec.compression,
        )
        self._status = replace(
            self._status,
            ready=True,
            parameter_bytes=sum(stage.parameter_bytes for stage in self._stages),
            load_s=time.monotonic() - begin,
            gpus=tuple(self._gpu(number) for number in range(len(self._devices))) if self._on_gpu else (),
        )
        return self._status

    @ray.method(concurrency_group="control")
    def status(self) -> StageStatus:
        """How far this stage is."""
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        status = replace(self._status, peak_rss_bytes=peak_rss_bytes)
        if self._writer is None:
            return status
        return replace(
            status,
            write_wait_s=self._writer.waited_s,
            write_s=self._writer.write_s,
            written_bytes=self._writer.written_bytes,
            gpus=tuple(self._with_peak(gpu, device) for gpu, device in zip(status.gpus, self._devices, strict=False)),
        )

    @ray.method(concurrency_group="forward")
    def forward(
        self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, payload: transport.Payload | None
    ) -> transport.Payload | None:
        """Take one micro-batch through the span; what is captured goes to the writer, the hidden states to the caller.

        Args:
            epoch: how often the chain began anew after a failure; calls of an earlier epoch end at once.
            step: this micro-batch's place in the order of its epoch, from 0 on without gaps.
            attempt: the try at the shard that the rows belong to.
            payload: what the stage before returned; None for the first.

        Returns:
            The hidden states' bits [B, T, H], or None from the chain's last stage.

        Raises:
            StageMemoryError: the micro-batch is too large for the memory that is left.
        """
        hidden_BTH = None if payload is None else transport.receive(payload, self._dtype, pinned=self._on_gpu)
        output, captured = self._in_turn(epoch, step, attempt, micro_batch, hidden_BTH)
        handed_on = transport.send(output.hidden_on_host()) if self._hands_on else None
        captured.result()
        return handed_on

    @ray.method(concurrency_group="collect")
    def collect(self, shard: int, attempt: str) -> tuple[PartReceipt, ...]:
        """Wait until every part of a shard whose last micro-batch went through is durable; give their receipts."""
        assert self._writer is not None, "load() comes first"
        return self._writer.collect(shard, attempt, self._writer_spec.timeout_s)

    @ray.method(concurrency_group="control")
    def reset(self, epoch: int, attempts: Sequence[tuple[int, str]]) -> None:
        """Begin an epoch: steps count from 0 again, what is still to come of earlier ones is dropped, `attempts` are given up.

        Args:
            attempts: (shard, attempt) of all that were in flight.

        Raises:
            TimeoutError: the micro-batch that is being computed does not end.
        """
        with self._turn:
            self._epoch = epoch
            self._next_step = 0
            self._turn.notify_all()
        self._abandon(attempts)
        self._compute.submit(int).result(self._writer_spec.timeout_s)
        self._capture.submit(int).result(self._writer_spec.timeout_s)
        self._abandon(attempts)  # what was being computed may have opened its attempt again

    def _abandon(self, attempts: Sequence[tuple[int, str]]) -> None:
        for shard, attempt in attempts:
            if self._writer is not None:
                # What the store would not delete is no commit's, and goes when the run is finished.
                with suppress(StoreError):
                    self._writer.abandon(shard, attempt)

    @ray.method(concurrency_group="collect")
    def close(self) -> None:
        """End the writer; unfinished parts are given up."""
        if self._writer is not None:
            self._writer.close()

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self, spec: StageSpec) -> Stage:
        before = self._status

        def count(read_bytes: int, needed_bytes: int) -> None:
            self._status = replace(self._status, read_bytes=before.read_bytes + read_bytes, needed_bytes=before.needed_bytes + needed_bytes)

        stage = load_stage(spec, count)
        count(stage.bytes_read, stage.needed_bytes)
        if self._on_gpu or spec.compile:
            # A size that finds no room here finds none later: the driver halves it then.
            with suppress(torch.OutOfMemoryError):
                stage.warm_up(self._writer_spec.batch_tokens)
        if self._on_gpu:
            torch.cuda.empty_cache()
        return stage

    def _gpu(self, number: int) -> GpuMeasured:
        """A GPU right after loading."""
        device = self._devices[number]
        properties = torch.cuda.get_device_properties(device)
        allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        index = int(ids[number]) if (ids := _visible()) and ids[number].isdecimal() else number
        return GpuMeasured(
            index, properties.name, properties.total_memory, allocated_bytes, reserved_bytes, allocated_bytes, reserved_bytes, 0
        )

    def _with_peak(self, gpu: GpuMeasured, device: torch.device) -> GpuMeasured:
        """The same with what torch's allocator held at most, and what the driver says is taken there now, by whomever."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return replace(
            gpu,
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
            used_bytes=total_bytes - free_bytes,
        )

    # -- computing ----------------------------------------------------------------------------------------------------

    def _in_turn(
        self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, hidden_BTH: torch.Tensor | None
    ) -> "tuple[StageOutput, Future[None]]":
        # Twice the watchdog's limit: the driver is the one that decides.
        limit_s = 2 * self._writer_spec.timeout_s
        with self._turn:
            came = self._turn.wait_for(lambda: epoch != self._epoch or self._next_step == step, limit_s)
            self._require_current(epoch)
            if not came:
                raise StageError(
                    f"Micro-batch {step} waited {limit_s:.0f} s for its turn; {self._next_step} never came.",
                    "Run the same command again: finished shards are kept. stage_timeout_s sets the wait.",
                )
            future = self._compute.submit(self._run, epoch, attempt, micro_batch, hidden_BTH)
            self._next_step += 1
            self._turn.notify_all()
        return future.result()

    def _require_current(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise StageError(f"A micro-batch of epoch {epoch} came in epoch {self._epoch}.", "The driver has given it up.")

    def _run(
        self, epoch: int, attempt: str, micro_batch: MicroBatch, hidden_BTH: torch.Tensor | None
    ) -> "tuple[StageOutput, Future[None]]":
        """Compute, or on a GPU begin to; the rows are waited for on the other thread, and so is the queue of the writer."""
        self._require_current(epoch)
        assert self._stages, "load() comes first"
        if not self._uncollected.acquire(timeout=self._writer_spec.timeout_s):
            raise StoreError(f"Captured rows found no way to the writer for {self._writer_spec.timeout_s:g} s.", "Check the disk or store.")
        self._began_at = self._began_at or time.monotonic()
        outputs: list[StageOutput] = []
        try:
            for stage in self._stages:
                outputs.append(stage.forward(micro_batch, hidden_BTH))
                hidden_BTH = outputs[-1].hidden_BTH
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self._uncollected.release()
            raise self._memory_error(error, micro_batch) from error
        except BaseException:
            self._uncollected.release()
            raise
        return outputs[-1], self._capture.submit(self._hand_over, attempt, micro_batch, outputs)

    def _hand_over(self, attempt: str, micro_batch: MicroBatch, outputs: Sequence[StageOutput]) -> None:
        assert self._writer is not None
        assert self._began_at is not None
        try:
            compute_s = sum(output.compute_s for output in outputs)
            computed_at = time.monotonic()
            captured = [layer for output in outputs for layer in output.captured]
            copied_at = time.monotonic()
            self._writer.submit(attempt, micro_batch, captured, self._writer_spec.timeout_s)
        finally:
            self._uncollected.release()
        status = self._status
        compute_s += status.compute_s
        self._status = replace(
            status,
            micro_batches=status.micro_batches + 1,
            tokens=status.tokens + micro_batch.num_tokens,
            padded_tokens=status.padded_tokens + micro_batch.padded_tokens,
            compute_s=compute_s,
            copy_s=status.copy_s + copied_at - computed_at,
            wait_s=max(0.0, computed_at - self._began_at - compute_s - self._writer.waited_s),
        )

    def _memory_error(self, error: RuntimeError, micro_batch: MicroBatch) -> BaseException:
        """What tells the driver to try a smaller micro-batch, with the memory that this one left given back; other errors as they are."""
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_OUT_OF_MEMORY not in str(error):
            return error
        if self._on_gpu:
            torch.cuda.empty_cache()
        num_sequences, length = micro_batch.token_ids_BT.shape
        return StageMemoryError(
            f"{num_sequences} sequences of {length} padded tokens found no room in the {self._status.span} "
            f"({self._status.device} of node {self._status.node}): {str(error).splitlines()[0]}",
            "Lower max_length or batch_tokens, spread the layers over more GPUs (stages, gpus_per_stage), or lower what others use there.",
            num_sequences,
            length,
        )


def _visible() -> list[str]:
    """The GPUs that this process sees, by the driver's numbers or names."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def actor_class(num_forward_threads: int) -> Any:
    """StageActor as a Ray actor class whose `forward` may be entered by so many micro-batches at once.

    They must be more than the micro-batches in flight: Ray may hand them over out of order, and each waits its turn.
    """
    groups = {"forward": num_forward_threads, "collect": 4, "control": 2}
    # Out of order, or a reset would wait behind a micro-batch that a hung neighbour will never send.
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(StageActor)
