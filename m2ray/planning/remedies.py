"""What would make a model fit: tried out one by one on the same arithmetic, nothing guessed."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from m2ray.config import OffloadTo
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device
from m2ray.planning.hardware import MaxMemory

STEP_TOKENS = 256
_FURTHER: Mapping[OffloadTo, tuple[OffloadTo, ...]] = {"none": ("cpu", "disk"), "cpu": ("disk",), "disk": ()}


@dataclass(frozen=True)
class Remedy:
    """One change that alone is enough. `option` is what to change, `value` to what, `text` says it in a sentence."""

    option: str
    value: str | int
    text: str


@dataclass(frozen=True)
class OffloadTrial:
    """What a plan that offloads comes to: whether all of it finds room, and the bytes of layers in host memory and on disks."""

    fits: bool
    host_bytes: int
    disk_bytes: int


def find_remedies(
    demand: Demand, chains: Sequence[Sequence[Device]], short: set[str], try_offload: Callable[[Demand], OffloadTrial]
) -> tuple[Remedy, ...]:
    """Every single change that gives all weights of all chains room, the cheapest first.

    Args:
        demand: what does not fit.
        chains: the devices.
        short: the resources that are short.
        try_offload: plans another demand on the same devices.
    """
    found: list[Remedy | None] = []
    if "gpu_memory" in short:
        changes = (_without_limits, _in_bfloat16, _smaller_batches, _shorter_prompts, _more_gpus)
        found += [change(demand, chains) for change in changes]
    if short & {"gpu_memory", "host_memory"}:
        found.append(_offload(demand, try_offload))
    return tuple(remedy for remedy in found if remedy is not None)


def _fits(demand: Demand, chains: Sequence[Sequence[Device]]) -> bool:
    return not any(demand.short_bytes(chain) for chain in chains)


def _without_limits(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    if demand.options.chains.max_memory == MaxMemory():
        return None
    unlimited = [[replace(device, usable_bytes=device.gpu.free_bytes if device.gpu else None) for device in chain] for chain in chains]
    return Remedy("max_memory", "none", "It fits on the same GPUs without max_memory.") if _fits(demand, unlimited) else None


def _in_bfloat16(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    if demand.itemsize_bytes == 2:
        return None
    halved = replace(demand, options=replace(demand.options, compute_dtype="bfloat16"))
    return Remedy("compute_dtype", "bfloat16", 'It fits with compute_dtype = "bfloat16".') if _fits(halved, chains) else None


def _smaller_batches(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    """The largest micro-batch that fits, in steps of 256 tokens. A longer sequence sets the floor."""

    def is_too_large(steps: int) -> bool:
        return not _fits(demand.with_batch_tokens(steps * STEP_TOKENS), chains)

    most = (demand.options.batch_tokens - 1) // STEP_TOKENS
    steps = bisect_left(range(1, most + 1), x=True, key=is_too_large)
    if steps == 0:
        return None
    return Remedy("batch_tokens", steps * STEP_TOKENS, f"It fits with batch_tokens = {steps * STEP_TOKENS} or less.")


def _shorter_prompts(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    """The longest prompt that fits, in steps of 256 tokens, where the longest is known."""
    longest = demand.options.longest_tokens
    if longest is None:
        return None

    def is_too_long(steps: int) -> bool:
        return not _fits(replace(demand, options=replace(demand.options, longest_tokens=steps * STEP_TOKENS)), chains)

    steps = bisect_left(range(1, (longest - 1) // STEP_TOKENS + 1), x=True, key=is_too_long)
    if steps == 0:
        return None
    return Remedy("max_length", steps * STEP_TOKENS, f"It fits with max_length = {steps * STEP_TOKENS} or less.")


def _more_gpus(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    """The smallest chain of GPUs like its largest that fits; a layer a GPU is the end of it."""
    most = max((device for chain in chains for device in chain), key=lambda device: device.usable_bytes or 0)
    if most.gpu is None:
        return None
    number = bisect_left(range(1, demand.num_layers + 1), x=True, key=lambda count: _fits(demand, [[most] * count])) + 1
    if number > demand.num_layers:
        return None
    each = "" if len(chains) == 1 else " for each replica"
    return Remedy("gpus", number, f"It fits on {number} GPUs like {most.gpu.name}{each}.")


def _offload(demand: Demand, try_offload: Callable[[Demand], OffloadTrial]) -> Remedy | None:
    """Host memory for what finds no room, or else the disk too: it runs, many times slower."""
    for offload in _FURTHER[demand.options.offload]:
        trial = try_offload(demand.with_offload(offload))
        if trial.fits and trial.host_bytes + trial.disk_bytes:
            of_these = f" {trial.disk_bytes:,} of these from disks," if trial.disk_bytes else ""
            copied_bytes = trial.host_bytes + trial.disk_bytes
            text = f'It runs with offload = "{offload}": {copied_bytes:,} bytes of layers are copied to the GPUs for each micro-batch,{of_these} slowly.'
            return Remedy("offload", offload, text)
    return None
