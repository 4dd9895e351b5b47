"""What would make a run fit: single changes, each tried on the whole plan, nothing guessed."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from m2ray.batches import PromptStats
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, chain_devices
from m2ray.planning.hardware import Cluster
from m2ray.planning.output import stored_row_bytes
from m2ray.planning.placing import place_all
from m2ray.sizes import MaxMemory

STEP_TOKENS = 256
_OFFLOAD = ("none", "cpu", "disk")

Chains = Sequence[Sequence[Device]]
Layout = tuple[Demand, Cluster, Chains, PromptStats | None]
"""What `place_all` places."""


@dataclass(frozen=True)
class Remedy:
    """One change that alone is enough. `option` is what to change, `value` to what, `text` says it in a sentence."""

    option: str
    value: str | int
    text: str


def find_remedies(
    demand: Demand, cluster: Cluster, chains: Chains, prompts: PromptStats | None, short: AbstractSet[str]
) -> tuple[Remedy, ...]:
    """Every single change that makes the run fit, the cheapest first; `short` are the resources that are short now."""
    found = []
    for option, candidates, changed, sentence in _changes(demand, cluster, chains, prompts, short):
        value = _first(candidates, partial(_fits, changed))
        if value is not None:
            found.append(Remedy(option, value, sentence.format(value=value, **_copied(changed(value)))))
    return tuple(found)


def _fits(changed: Callable[[Any], Layout], value: Any) -> bool:
    return not place_all(*changed(value)).shortages


def _first(candidates: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """The first that fits, or None. In a range, all values after one that fits do, so it is found by halving."""
    if isinstance(candidates, range):
        number = bisect_left(candidates, x=True, key=fits)
        return candidates[number] if number < len(candidates) else None
    return next((value for value in candidates if fits(value)), None)


def _copied(layout: Layout) -> dict[str, str]:
    """In words, what the GPUs are brought for each micro-batch."""
    placing = place_all(*layout)
    disk_bytes = sum(node.disk_bytes for node in placing.nodes)
    all_bytes = disk_bytes + sum(stage.host.running.get("offloaded", 0) for stage in placing.stages)
    return {"copied": f"{all_bytes:,}", "from_disks": f" {disk_bytes:,} of these from disks," if disk_bytes else ""}


def _changes(
    demand: Demand, cluster: Cluster, chains: Chains, prompts: PromptStats | None, short: AbstractSet[str]
) -> Iterator[tuple[str, Sequence[Any], Callable[[Any], Layout], str]]:
    """The table: an option, its values from the best on (none where it would not help), what each is tried with, and the sentence."""
    options = demand.options

    def to(name: str) -> Callable[[Any], Layout]:
        return lambda value: (demand.asking(**{name: value}), cluster, chains, prompts)

    def if_only(name: str) -> Callable[[Any], Layout]:
        return lambda value: (demand.assuming(**{name: value}), cluster, chains, prompts)

    def without_limits(_: str) -> Layout:
        unlimited = demand.asking(max_memory=MaxMemory())
        return unlimited, cluster, chain_devices(cluster, demand.num_layers, unlimited.options), prompts

    yield "max_memory", _if(options.max_memory != MaxMemory(), "none"), without_limits, "It fits without max_memory."
    yield (
        "compute_dtype",
        _if(demand.itemsize_bytes != 2, "bfloat16"),
        to("compute_dtype"),
        'It fits with compute_dtype = "bfloat16".',
    )
    yield "batch_tokens", _fewer(options.batch_tokens), to("batch_tokens"), "It fits with batch_tokens = {value} or less."
    yield "max_length", _fewer(demand.assumed.longest_tokens or 0), if_only("longest_tokens"), "It fits with max_length = {value} or less."
    yield (
        "in_flight",
        _less_in_flight(demand, cluster, chains),
        to("in_flight_bytes"),
        'It fits with in_flight = "{value}" or less, or a larger /dev/shm.',
    )
    are_smaller = any(stored_row_bytes(part, "planes") < stored_row_bytes(part, options.compression) for part in options.parts)
    yield "compression", _if(are_smaller, "planes"), to("compression"), 'It fits with compression = "planes".'
    yield (
        "output",
        _if(demand.assumed.disk_free_bytes is not None, "elsewhere"),
        lambda _: if_only("disk_free_bytes")(None),
        "It fits with an output on a larger disk or in a bucket, or with fewer layers.",
    )
    if "gpu_memory" in short:
        yield "gpus", range(1, demand.num_layers + 1), *_more_gpus(demand, chains)
    if not cluster.num_gpus:
        yield "nodes", range(1, demand.num_layers + 1), *_more_nodes(demand, cluster, prompts)
    if short & {"gpu_memory", "host_memory"}:
        further = _OFFLOAD[_OFFLOAD.index(options.offload) + 1 :]
        sentence = (
            'It runs with offload = "{value}": {copied} bytes of layers are copied to the GPUs for each micro-batch,{from_disks} slowly.'
        )
        yield "offload", further, to("offload"), sentence


def _if(helps: bool, value: str) -> Sequence[str]:  # noqa: FBT001 - read as a word: the value if it helps
    return (value,) if helps else ()


def _fewer(tokens: int) -> range:
    """Fewer than `tokens`, in steps of 256, the most first."""
    return range((tokens - 1) // STEP_TOKENS * STEP_TOKENS, 0, -STEP_TOKENS)


def _less_in_flight(demand: Demand, cluster: Cluster, chains: Chains) -> Sequence[int]:
    """As much between the stages as the smallest /dev/shm holds for the chains there: a micro-batch's hidden states at least."""
    shares = []
    for node in cluster.nodes:
        num_chains = sum(any(device.node.name == node.name for device in chain) for chain in chains)
        if num_chains and node.shm_bytes is not None:
            shares.append(node.shm_bytes // num_chains)
    in_flight_bytes = min(shares, default=0)
    return [in_flight_bytes] if demand.workload.hidden_bytes <= in_flight_bytes < demand.options.in_flight_bytes else []


def _more_gpus(demand: Demand, chains: Chains) -> tuple[Callable[[int], Layout], str]:
    """A chain of GPUs like its largest. It is judged by GPU memory alone: there are no nodes, and no prompts."""
    most = max((device for chain in chains for device in chain), key=lambda device: device.usable_bytes or 0)
    assert most.gpu is not None
    limit = "" if most.usable_bytes == most.gpu.total_bytes else f" of which {most.usable_bytes or 0:,} bytes each may be used"
    each = "" if len(chains) == 1 else ", for each replica"
    return lambda number: (demand, Cluster(()), [[most] * number], None), f"It fits on {{value}} GPUs like {most.gpu.name}{limit}{each}."


def _more_nodes(demand: Demand, cluster: Cluster, prompts: PromptStats | None) -> tuple[Callable[[int], Layout], str]:
    """Without GPUs: nodes like the one with most memory, a stage each."""
    largest = max(cluster.nodes, key=lambda node: node.host_free_bytes or node.host_bytes or 0)

    def on(number: int) -> Layout:
        wider = Cluster(tuple(replace(largest, name=f"{largest.name}-{copy}") for copy in range(number)))
        asked = demand.asking(stages=number, replicas=1, max_memory=MaxMemory())
        return asked, wider, chain_devices(wider, demand.num_layers, asked.options), prompts

    return on, f"It fits on {{value}} nodes like {largest.name}, with stages = {{value}}."
