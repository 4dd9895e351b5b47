"""What would make a run fit: tried out one by one on the same arithmetic, nothing guessed."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from m2ray.config import OffloadTo
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, chain_devices
from m2ray.planning.hardware import Cluster
from m2ray.sizes import MaxMemory

STEP_TOKENS = 256
_FURTHER: Mapping[OffloadTo, tuple[OffloadTo, ...]] = {"none": ("cpu", "disk"), "cpu": ("disk",), "disk": ()}

Chains = Sequence[Sequence[Device]]

Fits = Callable[[Demand, Cluster, Chains], bool]
"""Whether nothing is short: GPU memory, host memory, /dev/shm, disk."""


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
    demand: Demand, cluster: Cluster, chains: Chains, short: AbstractSet[str], fits: Fits, try_offload: Callable[[Demand], OffloadTrial]
) -> tuple[Remedy, ...]:
    """Every single change that makes the run fit, the cheapest first. How many GPUs would do is judged by GPU memory alone.

    Args:
        demand: what does not fit.
        chains: the devices.
        short: the resources that are short.
        try_offload: plans another demand on the same devices.
    """
    found = [
        _without_limits(demand, cluster, fits),
        _in_bfloat16(demand, cluster, chains, fits),
        _smaller_batches(demand, cluster, chains, fits),
        _shorter_prompts(demand, cluster, chains, fits),
        _less_in_flight(demand, cluster, chains, fits),
        _in_planes(demand, cluster, chains, fits),
        _other_output(demand, cluster, chains, fits),
        _more_gpus(demand, chains),
        _more_nodes(demand, cluster, fits),
        _offload(demand, try_offload) if short & {"gpu_memory", "host_memory"} else None,
    ]
    return tuple(remedy for remedy in found if remedy is not None)


def _has_room(demand: Demand, chains: Chains) -> bool:
    return not any(demand.short_bytes(chain) for chain in chains)


def _without_limits(demand: Demand, cluster: Cluster, fits: Fits) -> Remedy | None:
    """All that is free on all GPUs, those that the limits left out among them."""
    if demand.options.max_memory == MaxMemory():
        return None
    unlimited = demand.asking(max_memory=MaxMemory())
    chains = chain_devices(cluster, demand.num_layers, unlimited.options)
    return Remedy("max_memory", "none", "It fits without max_memory.") if fits(unlimited, cluster, chains) else None


def _in_bfloat16(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    if demand.itemsize_bytes == 2:
        return None
    halved = demand.asking(compute_dtype="bfloat16")
    return Remedy("compute_dtype", "bfloat16", 'It fits with compute_dtype = "bfloat16".') if fits(halved, cluster, chains) else None


def _smaller_batches(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    """The largest micro-batch that fits, in steps of 256 tokens. A longer sequence sets the floor."""

    def is_too_large(steps: int) -> bool:
        return not fits(demand.asking(batch_tokens=steps * STEP_TOKENS), cluster, chains)

    most = (demand.options.batch_tokens - 1) // STEP_TOKENS
    steps = bisect_left(range(1, most + 1), x=True, key=is_too_large)
    if steps == 0:
        return None
    return Remedy("batch_tokens", steps * STEP_TOKENS, f"It fits with batch_tokens = {steps * STEP_TOKENS} or less.")


def _shorter_prompts(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    """The longest prompt that fits, in steps of 256 tokens, where the longest is known."""
    longest = demand.assumed.longest_tokens
    if longest is None:
        return None

    def is_too_long(steps: int) -> bool:
        return not fits(demand.assuming(longest_tokens=steps * STEP_TOKENS), cluster, chains)

    steps = bisect_left(range(1, (longest - 1) // STEP_TOKENS + 1), x=True, key=is_too_long)
    if steps == 0:
        return None
    return Remedy("max_length", steps * STEP_TOKENS, f"It fits with max_length = {steps * STEP_TOKENS} or less.")


def _less_in_flight(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    """As much between the stages as the smallest /dev/shm holds for the chains there: a micro-batch's hidden states at least."""
    shares = []
    for node in cluster.nodes:
        num_chains = sum(any(device.node.name == node.name for device in chain) for chain in chains)
        if num_chains and node.shm_bytes is not None:
            shares.append(node.shm_bytes // num_chains)
    in_flight_bytes = min(shares, default=0)
    if not demand.workload.hidden_bytes <= in_flight_bytes < demand.options.in_flight_bytes:
        return None
    lower = demand.asking(in_flight_bytes=in_flight_bytes)
    if not fits(lower, cluster, chains):
        return None
    return Remedy("in_flight", in_flight_bytes, f'It fits with in_flight = "{in_flight_bytes}" or less, or a larger /dev/shm.')


def _in_planes(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    if demand.options.compression == "planes" or any(part.dtype == "float32" for part in demand.options.parts):
        return None
    planes = demand.asking(compression="planes")
    return Remedy("compression", "planes", 'It fits with compression = "planes".') if fits(planes, cluster, chains) else None


def _other_output(demand: Demand, cluster: Cluster, chains: Chains, fits: Fits) -> Remedy | None:
    """Where only the output's disk is too small."""
    if demand.assumed.disk_free_bytes is None or not fits(demand.assuming(disk_free_bytes=None), cluster, chains):
        return None
    return Remedy("output", "elsewhere", "It fits with an output on a larger disk or in a bucket, or with fewer layers.")


def _more_gpus(demand: Demand, chains: Chains) -> Remedy | None:
    """The smallest chain of GPUs like its largest that has room; a layer a GPU is the end of it."""
    most = max((device for chain in chains for device in chain), key=lambda device: device.usable_bytes or 0)
    if most.gpu is None or _has_room(demand, chains):
        return None
    number = bisect_left(range(1, demand.num_layers + 1), x=True, key=lambda count: _has_room(demand, [[most] * count])) + 1
    if number > demand.num_layers:
        return None
    usable_bytes = most.usable_bytes or 0
    limit = "" if usable_bytes == most.gpu.total_bytes else f" of which {usable_bytes:,} bytes each may be used"
    each = "" if len(chains) == 1 else ", for each replica"
    return Remedy("gpus", number, f"It fits on {number} GPUs like {most.gpu.name}{limit}{each}.")


def _more_nodes(demand: Demand, cluster: Cluster, fits: Fits) -> Remedy | None:
    """Without GPUs: the smallest number of nodes like the one with most memory, a stage each; a layer a node is the end of it."""
    if cluster.num_gpus:
        return None
    largest = max(cluster.nodes, key=lambda node: node.host_free_bytes or node.host_bytes or 0)

    def do(number: int) -> bool:
        wider = Cluster(tuple(replace(largest, name=f"{largest.name}-{copy}") for copy in range(number)))
        asked = demand.asking(stages=number, replicas=1, max_memory=MaxMemory())
        return fits(asked, wider, chain_devices(wider, demand.num_layers, asked.options))

    number = bisect_left(range(1, demand.num_layers + 1), x=True, key=do) + 1
    if number > demand.num_layers:
        return None
    return Remedy("nodes", number, f"It fits on {number} nodes like {largest.name}, with stages = {number}.")


def _offload(demand: Demand, try_offload: Callable[[Demand], OffloadTrial]) -> Remedy | None:
    """Host memory for what finds no room, or else the disk too: it runs, many times slower."""
    for offload in _FURTHER[demand.options.offload]:
        trial = try_offload(demand.asking(offload=offload))
        if trial.fits and trial.host_bytes + trial.disk_bytes:
            of_these = f" {trial.disk_bytes:,} of these from disks," if trial.disk_bytes else ""
            copied_bytes = trial.host_bytes + trial.disk_bytes
            text = f'It runs with offload = "{offload}": {copied_bytes:,} bytes of layers are copied to the GPUs for each micro-batch,{of_these} slowly.'
            return Remedy("offload", offload, text)
    return None
