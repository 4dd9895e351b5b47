"""What would make a run fit: single changes, each tried on the whole plan, nothing guessed."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from m2ray.batches import PromptStats
from m2ray.errors import ClusterError, ConfigError
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, chain_devices
from m2ray.planning.hardware import DRIVER_BYTES, Cluster, Node
from m2ray.planning.output import stored_row_bytes
from m2ray.planning.placing import place_all
from m2ray.sizes import MaxMemory

STEP_TOKENS = 256
_OFFLOAD = ("none", "cpu", "auto", "disk")
_OTHER_WEIGHTS = {"bf16": ("packed",), "packed": ("auto",), "auto": ()}
"""What may find room instead: few layers take less ready than packed with a workspace."""

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
            in_words = sentence.format(value=value, stages=_stages(demand, value), **_brought(changed(value)))
            found.append(Remedy(option, value, in_words))
    return tuple(found)


def _fits(changed: Callable[[Any], Layout], value: Any) -> bool:
    try:
        return not place_all(*changed(value)).shortages
    except (ClusterError, ConfigError):  # such hardware cannot have the other options as they are given
        return False


def _first(candidates: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """The first that fits, or None. In a range, all values after one that fits do, so it is found by halving."""
    if isinstance(candidates, range):
        number = bisect_left(candidates, x=True, key=fits)
        return candidates[number] if number < len(candidates) else None
    return next((value for value in candidates if fits(value)), None)


def _brought(layout: Layout) -> dict[str, str]:
    """In words, what the devices are brought once a wave."""
    demand, placed = layout[0], place_all(*layout).placed
    from_host = sum(demand.bytes_in(each.residency, "host") for each in placed if each.device.gpu)
    from_files = sum(demand.bytes_in(each.residency, "checkpoint") for each in placed)
    return {"brought": f"{from_host + from_files:,}", "from_files": f" {from_files:,} of these from files," if from_files else ""}


def _changes(
    demand: Demand, cluster: Cluster, chains: Chains, prompts: PromptStats | None, short: AbstractSet[str]
) -> Iterator[tuple[str, Sequence[Any], Callable[[Any], Layout], str]]:
    """The table: an option, its values from the best on (none where it would not help), what each is tried with, and the sentence."""
    options = demand.options

    def to(name: str) -> Callable[[Any], Layout]:
        return lambda value: (demand.asking(**{name: value}), cluster, chains, prompts)

    def if_only(name: str) -> Callable[[Any], Layout]:
        return lambda value: (demand.assuming(**{name: value}), cluster, chains, prompts)

    def elsewhere(**changed: Any) -> Layout:
        """On the same nodes, of which the chains may get other GPUs."""
        asked = demand.asking(**changed)
        return asked, cluster, chain_devices(cluster, demand.num_layers, asked.options), prompts

    is_one_gpu = options.device_map.startswith("cuda:")
    yield "device_map", _if(is_one_gpu, "auto"), lambda value: elsewhere(device_map=value), 'It fits with device_map = "auto".'
    yield (
        "max_memory",
        _if(options.max_memory != MaxMemory(), "none"),
        lambda _: elsewhere(max_memory=MaxMemory()),
        "It fits without max_memory.",
    )
    yield "stages", _more_stages(demand, cluster), lambda value: elsewhere(stages=value), "It fits with stages = {value}."
    yield (
        "replicas",
        range(options.replicas - 1, 0, -1),
        lambda value: elsewhere(replicas=value),
        "It fits with replicas = {value}.",
    )
    yield (
        "compute_dtype",
        _if(demand.itemsize_bytes != 2, "bfloat16"),
        to("compute_dtype"),
        'It fits with compute_dtype = "bfloat16".',
    )
    yield "weights", _OTHER_WEIGHTS[options.weights] if demand.is_packed else (), to("weights"), 'It fits with weights = "{value}".'
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
    layers = sorted({part.layer for part in options.parts if part.layer is not None})
    yield (
        "layers",
        range(len(layers) - 1, 0, -1) if "disk" in short else (),
        lambda number: to("parts")(tuple(part for part in options.parts if part.layer is None or part.layer in layers[-number:])),
        f"It fits with {{value}} of the {len(layers)} layers.",
    )
    yield (
        "output",
        _if(demand.assumed.disk_free_bytes is not None, "elsewhere"),
        lambda _: if_only("disk_free_bytes")(None),
        "It fits with an output on a larger disk or in a bucket.",
    )
    if "gpu_memory" in short:
        size = options.gpus_per_stage
        yield "gpus", range(size, demand.num_layers + 1, size), *_more_gpus(demand, chains, prompts)
    if not cluster.num_gpus:
        yield "nodes", range(1, demand.num_layers + 1), *_more_nodes(demand, cluster, prompts)
    if short & {"gpu_memory", "host_memory"}:
        further = _OFFLOAD[_OFFLOAD.index(options.offload) + 1 :]
        sentence = (
            'It runs with offload = "{value}": {brought} bytes of layers are brought in turn,{from_files} once for many micro-batches.'
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


def _more_stages(demand: Demand, cluster: Cluster) -> Sequence[int]:
    """More stages than were asked for, where there are GPUs or nodes that the chains do not use yet."""
    options = demand.options
    places = cluster.num_gpus // options.gpus_per_stage if cluster.num_gpus else len(cluster.nodes)
    most = min(places // options.replicas, demand.num_layers // options.gpus_per_stage)
    return tuple(range(options.stages + 1, most + 1)) if options.stages else ()


def _stages(demand: Demand, num_gpus: Any) -> int:
    """Stages of a chain that has this many GPUs."""
    return num_gpus // demand.options.gpus_per_stage if isinstance(num_gpus, int) else 0


def _more_gpus(demand: Demand, chains: Chains, prompts: PromptStats | None) -> tuple[Callable[[int], Layout], str]:
    """For each chain that many GPUs like its largest, on nodes like that one's."""
    options = demand.options
    most = max((device for chain in chains for device in chain), key=lambda device: device.usable_bytes or 0)
    assert most.gpu is not None
    gpu, on_a_node = replace(most.gpu, free_bytes=most.usable_bytes or 0), max(len(most.node.gpus), options.gpus_per_stage)
    is_one_gpu = options.device_map.startswith("cuda:")
    freed = demand.asking(max_memory=MaxMemory(), device_map="auto" if is_one_gpu else options.device_map)

    def on(number: int) -> Layout:
        left = number * options.replicas
        nodes: list[Node] = []
        while left > 0:
            gpus = tuple(replace(gpu, index=index) for index in range(min(left, on_a_node)))
            nodes.append(replace(most.node, name=f"{most.node.name}-{len(nodes)}", gpus=gpus))
            left -= len(gpus)
        wider, asked = Cluster(tuple(nodes)), freed.asking(stages=_stages(demand, number)) if options.stages else freed
        return asked, wider, chain_devices(wider, demand.num_layers, asked.options), prompts

    usable_bytes = most.usable_bytes or 0
    limit = "" if usable_bytes >= most.gpu.total_bytes - DRIVER_BYTES else f" of which {usable_bytes:,} bytes each may be used"
    each = "" if len(chains) == 1 else ", for each replica"
    asking = [*(["stages = {stages}"] if options.stages else []), *(['device_map = "auto"'] if is_one_gpu else [])]
    others = f", with {' and '.join(asking)}" if asking else ""
    return on, f"It fits on {{value}} GPUs like {most.gpu.name}{limit}{each}{others}."


def _more_nodes(demand: Demand, cluster: Cluster, prompts: PromptStats | None) -> tuple[Callable[[int], Layout], str]:
    """Without GPUs: nodes like the one with most memory, a stage each."""
    options, largest = demand.options, max(cluster.nodes, key=lambda node: node.host_free_bytes or node.host_bytes or 0)

    def on(number: int) -> Layout:
        wider = Cluster(tuple(replace(largest, name=f"{largest.name}-{copy}") for copy in range(number)))
        asked = demand.asking(stages=number, replicas=1, max_memory=MaxMemory(options.max_memory.everywhere))
        return asked, wider, chain_devices(wider, demand.num_layers, asked.options), prompts

    one_chain = " and replicas = 1" if options.replicas > 1 else ""
    return on, f"It fits on {{value}} nodes like {largest.name}, with stages = {{value}}{one_chain}."
