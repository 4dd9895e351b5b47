"""What would make a model fit: tried out one by one on the same arithmetic, nothing guessed."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device
from m2ray.planning.hardware import MaxMemory
from m2ray.planning.memory import weight_bytes

_STEP_TOKENS = 256


@dataclass(frozen=True)
class Remedy:
    """One change that alone is enough. `option` is what to change, `value` to what, `text` says it in a sentence."""

    option: str
    value: str | int
    text: str


def find_remedies(demand: Demand, chains: Sequence[Sequence[Device]]) -> tuple[Remedy, ...]:
    """Every single change that gives all weights of all chains room, the cheapest first."""
    found = [_without_limits(demand, chains), _in_bfloat16(demand, chains), _smaller_batches(demand, chains), _more_gpus(demand, chains)]
    found.append(_offload(demand, chains))
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
        return not _fits(demand.with_batch_tokens(steps * _STEP_TOKENS), chains)

    most = (demand.options.batch_tokens - 1) // _STEP_TOKENS
    steps = bisect_left(range(1, most + 1), x=True, key=is_too_large)
    if steps == 0:
        return None
    return Remedy("batch_tokens", steps * _STEP_TOKENS, f"It fits with batch_tokens = {steps * _STEP_TOKENS} or less.")


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


def _offload(demand: Demand, chains: Sequence[Sequence[Device]]) -> Remedy | None:
    """Host memory for what finds no room: it runs, many times slower."""
    offloading = replace(demand, options=replace(demand.options, offload=True))
    if demand.options.offload or not _fits(offloading, chains):
        return None
    kept_bytes = 0
    for chain in chains:
        for held in offloading.split(chain):
            layers = offloading.offloaded(held.span, chain[held.device])
            kept_bytes += weight_bytes(offloading.layer_rows(layers), demand.itemsize_bytes) if layers else 0
    text = f'It runs with offload = "cpu": {kept_bytes:,} bytes of layers are copied to the GPUs for each micro-batch, slowly.'
    return Remedy("offload", "cpu", text)
