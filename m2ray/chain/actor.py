"""StageActor: a thin Ray shell around one stage of the model and the writer of what it captures."""

import os
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from m2ray.activations.schema import Compression
from m2ray.activations.writer import ActivationWriter
from m2ray.batches import MicroBatch, PartReceipt
from m2ray.chain import transport
from m2ray.errors import StageError, StoreError
from m2ray.model.stage import Stage, StageOutput, StageSpec, load_stage
from m2ray.storage import open_store


@dataclass(frozen=True)
class WriterSpec:
    """Where and how a stage writes: the run folder, what every part's footer says, and the writer's bounds."""

    output: str
    run_metadata: Mapping[str, str]
    queue_bytes: int
    threads: int
    timeout_s: float
    compression: Compression = "none"


@dataclass(frozen=True)
class StageStatus:
    """What a stage has done so far. Times are sums over its micro-batches."""

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
    compute_s: float = 0.0
    idle_s: float = 0.0
    write_wait_s: float = 0.0
    written_bytes: int = 0
    peak_rss_bytes: int = 0


class StageActor:
    """Runs one span. Ray calls `forward` on several threads, so that one micro-batch is received or handed on while
    another computes; the computing itself is done on one thread, in the order of `step`.
    """

    def __init__(self, spec: StageSpec, writer: WriterSpec, *, hands_on: bool, epoch: int) -> None:
        on_gpu = bool(ray.get_gpu_ids())
        self._spec = replace(spec, device="cuda:0" if on_gpu else "cpu")
        self._writer_spec = writer
        self._hands_on = hands_on
        self._device = torch.device(self._spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._stage: Stage | None = None
        self._writer: ActivationWriter | None = None
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._turn = threading.Condition()
        self._next_step = 0
        self._epoch = epoch
        self._idle_since: float | None = None
        self._status = StageStatus(
            str(spec.span), ray.util.get_node_ip_address(), self._spec.device, ray.get_runtime_context().get_node_id(), os.getpid()
        )

    @ray.method(concurrency_group="collect")
    def load(self) -> StageStatus:
        """Build the span, reading only its own tensors.

        Raises:
            CheckpointError: the span's tensors are missing or damaged.
            StoreError: the run folder of the driver is not visible from this node.
        """
        begin = time.monotonic()
        store = open_store(self._writer_spec.output)
        if store.size("job.json") is None:
            raise StoreError(
                f"{store.url} on node {self._status.node} has no job.json, though the driver wrote it.",
                "Give an output folder on a disk that all nodes share.",
            )
        self._stage = self._compute.submit(load_stage, self._spec, self._count_read).result()
        self._writer = ActivationWriter(
            store,
            self._writer_spec.run_metadata,
            self._stage.parts,
            queue_bytes=self._writer_spec.queue_bytes,
            threads=self._writer_spec.threads,
            compression=self._writer_spec.compression,
        )
        self._status = replace(
            self._status,
            ready=True,
            needed_bytes=self._stage.needed_bytes,
            read_bytes=self._stage.bytes_read,
            parameter_bytes=self._stage.parameter_bytes,
            load_s=time.monotonic() - begin,
        )
        return self._status

    @ray.method(concurrency_group="control")
    def status(self) -> StageStatus:
        """How far this stage is."""
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._writer is None:
            return replace(self._status, peak_rss_bytes=peak_rss_bytes)
        return replace(
            self._status,
            peak_rss_bytes=peak_rss_bytes,
            write_wait_s=self._writer.waited_s,
            written_bytes=self._writer.written_bytes,
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
        """
        hidden_BTH = None if payload is None else transport.receive(payload, self._dtype, self._device)
        computed = self._in_turn(epoch, step, attempt, micro_batch, hidden_BTH)
        return transport.send(computed) if self._hands_on and computed is not None else None

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

    def _count_read(self, read_bytes: int, needed_bytes: int) -> None:
        self._status = replace(self._status, read_bytes=read_bytes, needed_bytes=needed_bytes)

    def _in_turn(
        self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, hidden_BTH: torch.Tensor | None
    ) -> torch.Tensor | None:
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

    def _run(self, epoch: int, attempt: str, micro_batch: MicroBatch, hidden_BTH: torch.Tensor | None) -> torch.Tensor | None:
        self._require_current(epoch)
        assert self._stage is not None, "load() comes first"
        assert self._writer is not None, "load() comes first"
        begin = time.monotonic()
        output: StageOutput = self._stage.forward(micro_batch, hidden_BTH)
        computed = time.monotonic()
        self._writer.submit(attempt, micro_batch, output.captured, self._writer_spec.timeout_s)
        self._status = replace(
            self._status,
            micro_batches=self._status.micro_batches + 1,
            tokens=self._status.tokens + micro_batch.num_tokens,
            compute_s=self._status.compute_s + computed - begin,
            idle_s=self._status.idle_s + (begin - self._idle_since if self._idle_since else 0.0),
        )
        self._idle_since = time.monotonic()
        return output.hidden_BTH


def actor_class(num_forward_threads: int) -> Any:
    """StageActor as a Ray actor class whose `forward` may be entered by so many micro-batches at once.

    They must be more than the micro-batches in flight: Ray may hand them over out of order, and each waits its turn.
    """
    groups = {"forward": num_forward_threads, "collect": 4, "control": 2}
    # Out of order, or a reset would wait behind a micro-batch that a hung neighbour will never send.
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(StageActor)
