"""What a stage tells of itself when it is asked, and what the driver makes of all stages: for the progress line and for report.json."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
import torch

from m2ray.activations.writing.backlog import Figures
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.eight_bits import Losses
from m2ray.model.stage import StageSpec
from m2ray.planning.placing import StagePlan


@dataclass(frozen=True)
class GpuStatus:
    """One GPU of a stage, as torch's allocator says: right after loading, and at its peak since the start.

    `used_bytes`: what the driver says is taken on it, context and other processes counted, when it was last asked.
    """

    index: int
    name: str
    total_bytes: int
    loaded_allocated_bytes: int
    loaded_reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class StageStatus:
    """What a stage has done so far. Seconds are sums over its micro-batches; bytes are of this run, not of those it went on with.

    Attributes:
        node, device, node_id, pid: where it runs; the devices in words, Ray's id of the node, and the process.
        needed_bytes: of the checkpoint, which it loads. read_bytes: of them, read so far, by it or by another process of its node. load_s: from the call to the last tensor
            in place. warm_up_left: micro-batches of zeros that it still has to run before the first real one, now.
        parameter_bytes: in memory.
        tokens, padded_tokens: real ones, and computed ones.
        compute_s: of layers and selection, by the device's own clock. wait_s: the rest of the time since the first micro-batch, mostly
            spent on waiting for the stage before. copy_s: of copying captured rows to the host, after the layers are done.
        write_wait_s: of waiting for room in the writer's queue; two micro-batches later the computation stands still.
        write_s: of the writer's threads, encoding and storing, beside the computation. store_s: the store's share of it.
        sends_by: how hidden states went to the next stage, "cuda_ipc" or "object_store"; empty where there is none.
        queued_bytes: captured, that wait for the store or are on their way there now. stored_parts: durable.
        silent_s: since the driver was told this; 0 where it is told.
        peak_rss_bytes: of its process; and of the one that writes beside it, what that had to itself whenever it was asked.
        gpus: in the order of its span; none on a CPU.
        weights: once it is loaded, the digest of each of its layers, and at None that of what runs before the first one;
            at BARE_LAST_LAYER, where the final norm was loaded, the last layer's without it.
        losses: what rows in 8 bits have lost, by part.
    """

    span: LayerSpan
    node: str
    device: str
    node_id: str = ""
    pid: int = 0
    needed_bytes: int = 0
    read_bytes: int = 0
    parameter_bytes: int = 0
    load_s: float = 0.0
    warm_up_left: int = 0
    micro_batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    copy_s: float = 0.0
    write_wait_s: float = 0.0
    write_s: float = 0.0
    store_s: float = 0.0
    written_bytes: int = 0
    queued_bytes: int = 0
    stored_parts: int = 0
    silent_s: float = 0.0
    peak_rss_bytes: int = 0
    sends_by: str = ""
    gpus: tuple[GpuStatus, ...] = ()
    weights: Mapping[int | None, str] = field(default_factory=dict)
    losses: Losses = ()

    @property
    def busy_share(self) -> float:
        """The share of the time since its first micro-batch that it computed."""
        known_s = self.compute_s + self.wait_s
        return self.compute_s / known_s if known_s else 0.0


@dataclass(frozen=True)
class RunStatus:
    """The run as the driver sees it, by now or at its end.

    Attributes:
        shards, all_shards: committed, and of the job. tokens_before, all_tokens: committed by earlier runs of the job, and of the job.
        tokens: real ones that left the chains in this run.
        load_s, extract_s: until the first chain had its layers; from then on, to the last commit.
        rows: of each site and layer, committed in this run; row_tokens: tokens of their shards.
        output_bytes: of the parts committed in this run; what was written for attempts that failed is among the stages' `written_bytes` alone.
        stages: every stage that has answered, with its plan. One that was restarted counts from there on.
        shards_here: committed by this driver. quarantined: rows of the prompts. site_rows, site_bytes: of the parts that it committed.
        failures: of all chains, after which they went on or ended; store_failures: those of the store. retried_shards: in flight then.
    """

    shards: int
    all_shards: int
    tokens: int
    tokens_before: int
    all_tokens: int
    load_s: float
    extract_s: float
    output_bytes: int
    stages: tuple[tuple[StagePlan, StageStatus], ...]
    rows: int = 0
    row_tokens: int = 0
    shards_here: int = 0
    quarantined: int = 0
    site_rows: Mapping[str, int] = field(default_factory=dict)
    site_bytes: Mapping[str, int] = field(default_factory=dict)
    failures: int = 0
    store_failures: int = 0
    retried_shards: int = 0

    @property
    def statuses(self) -> list[StageStatus]:
        return [status for _, status in self.stages]

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.extract_s if self.extract_s > 0 else None

    @property
    def left_s(self) -> float | None:
        """The time left at the rate so far; None where nothing was done yet."""
        left_tokens = self.all_tokens - self.tokens_before - self.tokens
        return left_tokens / self.tokens_per_s if self.tokens_per_s else None

    @property
    def padding_waste(self) -> float:
        """Share of the computed tokens that were padding."""
        computed = sum(stage.padded_tokens for stage in self.statuses)
        return 1 - sum(stage.tokens for stage in self.statuses) / computed if computed else 0.0

    @property
    def written_bytes(self) -> int:
        return sum(stage.written_bytes for stage in self.statuses)

    @property
    def lost_shares(self) -> dict[tuple[str, int | None], float]:
        """What rows in 8 bits have lost, by site and layer: the root of the mean square of it, as a share of that of the values."""
        sums: dict[tuple[str, int | None], list[float]] = {}
        for site, layer, lost, whole in (each for stage in self.statuses for each in stage.losses):
            of_part = sums.setdefault((site, layer), [0.0, 0.0])
            of_part[0] += lost
            of_part[1] += whole
        return {part: (lost / whole) ** 0.5 if whole else 0.0 for part, (lost, whole) in sums.items()}

    @property
    def gpu_busy(self) -> float | None:
        """The share of the time since its first micro-batch that the GPU of the busiest stage computed; None without GPUs."""
        return max((stage.busy_share for stage in self.statuses if stage.gpus and stage.compute_s), default=None)


def status_here(specs: Sequence[StageSpec]) -> StageStatus:
    """The status of an actor that holds these spans, one a device, and has done nothing yet."""
    span = LayerSpan(specs[0].span.start, specs[-1].span.stop)
    devices = ", ".join(spec.device for spec in specs)
    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""  # of a chain in the driver's process (here.py)
    return StageStatus(span, ray.util.get_node_ip_address() if node_id else "127.0.0.1", devices, node_id, os.getpid())


def measure_gpus(devices: Sequence[torch.device]) -> tuple[GpuStatus, ...]:
    """The GPUs of a stage right after loading."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    measured = []
    for number, device in enumerate(devices):
        properties = torch.cuda.get_device_properties(device)
        allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        # By the driver's numbers, where Ray gave those.
        index = int(visible[number]) if number < len(visible) and visible[number].isdecimal() else number
        measured.append(
            GpuStatus(index, properties.name, properties.total_memory, allocated_bytes, reserved_bytes, allocated_bytes, reserved_bytes, 0)
        )
    return tuple(measured)


def with_micro_batch(status: StageStatus, micro_batch: MicroBatch) -> StageStatus:
    """The same with one more micro-batch that has gone through all layers."""
    return replace(
        status,
        micro_batches=status.micro_batches + 1,
        tokens=status.tokens + micro_batch.num_tokens,
        padded_tokens=status.padded_tokens + micro_batch.padded_tokens,
    )


def with_layers(status: StageStatus, compute_s: float, copy_s: float, since_begin_s: float) -> StageStatus:
    """The same after a micro-batch's way through some layers. The time since the first one began, less all computing, was waiting."""
    compute_s += status.compute_s
    return replace(
        status,
        compute_s=compute_s,
        copy_s=status.copy_s + copy_s,
        wait_s=max(0.0, since_begin_s - compute_s),
    )


def with_writer(status: StageStatus, figures: Figures) -> StageStatus:
    """The same with what the writer has done so far."""
    found = figures._asdict()
    return replace(status, write_wait_s=found.pop("waited_s"), **found)


def with_peaks(status: StageStatus, devices: Sequence[torch.device]) -> StageStatus:
    """The same with what torch's allocator held at most, and what the driver says is taken there now, by all processes."""
    measured = []
    for gpu, device in zip(status.gpus, devices, strict=False):
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        measured.append(
            replace(
                gpu,
                peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
                peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
                used_bytes=total_bytes - free_bytes,
            )
        )
    return replace(status, gpus=tuple(measured))
