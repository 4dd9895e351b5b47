"""StageStatus: what a stage tells of itself when it is asked, and how its GPUs are looked at."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
import torch

from m2ray.activations.writer import ActivationWriter
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain.report import GpuMeasured
from m2ray.model.stage import StageSpec


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
    store_s: float = 0.0
    written_bytes: int = 0
    peak_rss_bytes: int = 0
    sends_by: str = ""
    gpus: tuple[GpuMeasured, ...] = ()
    weights: Mapping[int | None, str] = field(default_factory=dict)
    """Once it is loaded, the digest of each of its layers, and at None that of what runs before the first one."""


def status_here(specs: Sequence[StageSpec]) -> StageStatus:
    """Of an actor that holds these spans, one a device, and has not begun."""
    span = LayerSpan(specs[0].span.start, specs[-1].span.stop)
    devices = ", ".join(spec.device for spec in specs)
    return StageStatus(str(span), ray.util.get_node_ip_address(), devices, ray.get_runtime_context().get_node_id(), os.getpid())


def measure_gpus(devices: Sequence[torch.device]) -> tuple[GpuMeasured, ...]:
    """The GPUs of a stage right after loading."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    measured = []
    for number, device in enumerate(devices):
        properties = torch.cuda.get_device_properties(device)
        allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        # By the driver's numbers, where Ray gave those.
        index = int(visible[number]) if number < len(visible) and visible[number].isdecimal() else number
        measured.append(
            GpuMeasured(
                index, properties.name, properties.total_memory, allocated_bytes, reserved_bytes, allocated_bytes, reserved_bytes, 0
            )
        )
    return tuple(measured)


def with_micro_batch(status: StageStatus, micro_batch: MicroBatch, compute_s: float, copy_s: float, since_begin_s: float) -> StageStatus:
    """The same with one more micro-batch; what is left of the time since the first one began, less all computing, was waiting."""
    compute_s += status.compute_s
    return replace(
        status,
        micro_batches=status.micro_batches + 1,
        tokens=status.tokens + micro_batch.num_tokens,
        padded_tokens=status.padded_tokens + micro_batch.padded_tokens,
        compute_s=compute_s,
        copy_s=status.copy_s + copy_s,
        wait_s=max(0.0, since_begin_s - compute_s),
    )


def with_writer(status: StageStatus, writer: ActivationWriter) -> StageStatus:
    """The same with what the writer has done so far."""
    return replace(
        status,
        write_wait_s=writer.waited_s,
        write_s=writer.write_s,
        store_s=writer.store_s,
        written_bytes=writer.written_bytes,
    )


def with_peaks(status: StageStatus, devices: Sequence[torch.device]) -> StageStatus:
    """The same with what torch's allocator held at most, and what the driver says is taken there now, by whomever."""
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
