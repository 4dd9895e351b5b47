"""Where everything lies: the layers on the GPUs, what each stage and node holds, and what is short for it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from m2ray.batches import LayerSpan, PromptStats
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device
from m2ray.planning.hardware import Cluster
from m2ray.planning.memory import OFFLOAD_READ_BYTES, Memory, cpu_memory, gpu_host_memory, gpu_memory, window
from m2ray.planning.output import OutputPlan, plan_output
from m2ray.planning.rates import PlacedSpan
from m2ray.planning.spill import Spill, Spills, spill, to_disk

Resource = Literal["gpu_memory", "host_memory", "shared_memory", "disk"]


@dataclass(frozen=True)
class GpuPlan:
    """One GPU of a chain, by its `stage`; `span` is None where it gets no layer, and on all GPUs where the model does not fit.

    `spill` are the layers at the span's end whose weights stay elsewhere.
    """

    replica: int
    stage: int
    device: Device
    span: LayerSpan | None
    memory: Memory
    spill: Spill = field(default_factory=Spill)


@dataclass(frozen=True)
class StagePlan:
    """One stage that has layers: its span over all its GPUs, and what it takes of its node's memory."""

    replica: int
    stage: int
    node: str
    span: LayerSpan
    host: Memory


@dataclass(frozen=True)
class NodePlan:
    """What the stages of one node take together.

    `shm_bytes`, hidden states in /dev/shm, is part of `host_bytes`; `disk_bytes` are layers that are kept on its disk.
    """

    name: str
    host_bytes: int
    shm_bytes: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class Shortage:
    """What is not there. Of GPU memory it is the weights that find no room once every GPU is full."""

    resource: Resource
    where: str
    short_by_bytes: int


@dataclass(frozen=True)
class Placing:
    """Where everything lies, and what is short for it. Nothing is placed where GPU memory is short."""

    placed: tuple[PlacedSpan, ...]
    spills: Spills
    stages: tuple[StagePlan, ...]
    nodes: tuple[NodePlan, ...]
    output: OutputPlan | None
    shortages: tuple[Shortage, ...]


def place_all(demand: Demand, cluster: Cluster, chains: Sequence[Sequence[Device]], prompts: PromptStats | None) -> Placing:
    """Deal a model out over its chains, what finds no room on GPUs over hosts and disks, and count what each holds."""
    options = demand.options
    short_bytes = sum(demand.short_bytes(chain) for chain in chains)
    placed = () if short_bytes else tuple(each for replica, chain in enumerate(chains) for each in _place(demand, replica, chain))
    spills = _spills(demand, cluster, placed)
    stages = tuple(_stages(demand, placed, spills))
    nodes = _nodes(demand, cluster, stages, _disk_bytes(demand, placed, spills))
    output = plan_output(options.parts, prompts, demand.assumed.price_per_gb_month, options.compression) if prompts else None
    shortages = [Shortage("gpu_memory", "all GPUs together", short_bytes)] if short_bytes else []
    shortages += [*_node_shortages(cluster, nodes), *_disk_shortages(demand, output)]
    return Placing(placed, spills, stages, nodes, output, tuple(shortages))


def _place(demand: Demand, replica: int, chain: Sequence[Device]) -> Iterator[PlacedSpan]:
    size = demand.options.gpus_per_stage if chain[0].gpu else 1
    for held in demand.split(chain):
        yield PlacedSpan(replica, held.device // size, held.device, chain[held.device], held.span)


def _spills(demand: Demand, cluster: Cluster, placed: Sequence[PlacedSpan]) -> Spills:
    """What is not on the GPUs, dealt out between each node's memory and its disk."""
    spills = spill(demand, placed)
    without = _nodes(demand, cluster, tuple(_stages(demand, placed, {})), {}) if spills else ()
    for node, planned in zip(cluster.nodes, without, strict=False):
        keys = {(each.replica, each.place) for each in placed if each.device.node.name == node.name} & spills.keys()
        here = {key: spills[key] for key in keys}
        spills = {**spills, **to_disk(demand, here, node, planned.host_bytes + OFFLOAD_READ_BYTES * len(here))}
    return spills


def gpus_of(demand: Demand, chains: Sequence[Sequence[Device]], placing: Placing) -> Iterator[GpuPlan]:
    """Every GPU of every chain, in order; those that stay empty take nothing."""
    size = demand.options.gpus_per_stage
    spans = {(each.replica, each.place): each.span for each in placing.placed}
    for replica, chain in enumerate(chains):
        for place, device in enumerate(chain):
            if device.gpu is None:
                continue
            span = spans.get((replica, place))
            if span is None:
                yield GpuPlan(replica, place // size, device, None, Memory({} if placing.placed else demand.overhead, {}))
                continue
            spilt = placing.spills.get((replica, place), Spill())
            rows = [row for row in demand.rows(span) if spilt.layers is None or row.layer is None or row.layer not in spilt.layers]
            buffers_bytes = demand.turning_bytes(span) if spilt.layers else 0
            memory = gpu_memory(rows, demand.workload, demand.transient_bytes, demand.row_bytes(span), buffers_bytes)
            yield GpuPlan(replica, place // size, device, span, memory, spilt)


def _stages(demand: Demand, placed: Sequence[PlacedSpan], spills: Spills) -> Iterator[StagePlan]:
    for (replica, stage), group in groupby(placed, key=lambda each: (each.replica, each.stage)):
        of_stage = list(group)
        span = LayerSpan(of_stage[0].span.start, of_stage[-1].span.stop)
        row_bytes = demand.row_bytes(span)
        if of_stage[0].device.gpu:
            here = [spills[each.replica, each.place] for each in of_stage if (each.replica, each.place) in spills]
            offloaded_bytes = sum(demand.bytes_of(spilt.in_host) for spilt in here)
            readers_bytes = OFFLOAD_READ_BYTES * sum(spilt.on_disk is not None for spilt in here)
            host = gpu_host_memory(demand.workload, row_bytes, offloaded_bytes, readers_bytes)
        else:
            host = cpu_memory(demand.rows(span), demand.workload, demand.transient_bytes, row_bytes)
        yield StagePlan(replica, stage, of_stage[0].device.node.name, span, host)


def _disk_bytes(demand: Demand, placed: Sequence[PlacedSpan], spills: Spills) -> dict[str, int]:
    """Of layers that are kept on each node's disk, by its name."""
    kept: Counter[str] = Counter()
    for each in placed:
        kept[each.device.node.name] += demand.bytes_of(spills.get((each.replica, each.place), Spill()).on_disk)
    return kept


def _nodes(demand: Demand, cluster: Cluster, stages: Sequence[StagePlan], disk_bytes: Mapping[str, int]) -> tuple[NodePlan, ...]:
    """Hidden states in flight may all be on one node; a chain of one stage has none."""
    planned = []
    for node in cluster.nodes:
        here = [stage for stage in stages if stage.node == node.name]
        lengths = Counter(stage.replica for stage in stages)
        chains = {stage.replica for stage in here if lengths[stage.replica] > 1}
        shm_bytes = sum(min(demand.options.in_flight_bytes, window(lengths[replica]) * demand.workload.hidden_bytes) for replica in chains)
        host_bytes = sum(stage.host.peak_bytes for stage in here) + shm_bytes
        planned.append(NodePlan(node.name, host_bytes, shm_bytes, disk_bytes.get(node.name, 0)))
    return tuple(planned)


def _node_shortages(cluster: Cluster, nodes: Sequence[NodePlan]) -> list[Shortage]:
    """Host memory of every node, then /dev/shm, then the disk, as far as they are known."""
    host, shared, disk = [], [], []
    for node, planned in zip(cluster.nodes, nodes, strict=True):
        has_bytes = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
        if has_bytes is not None and planned.host_bytes > has_bytes:
            host.append(Shortage("host_memory", node.name, planned.host_bytes - has_bytes))
        if node.shm_bytes is not None and planned.shm_bytes > node.shm_bytes:
            shared.append(Shortage("shared_memory", node.name, planned.shm_bytes - node.shm_bytes))
        free_bytes = 0 if node.disk_in_memory else node.disk_free_bytes
        if free_bytes is not None and planned.disk_bytes > free_bytes:
            disk.append(Shortage("disk", node.name, planned.disk_bytes - free_bytes))
    return [*host, *shared, *disk]


def _disk_shortages(demand: Demand, output: OutputPlan | None) -> list[Shortage]:
    free_bytes = demand.assumed.disk_free_bytes
    if output is None or free_bytes is None or output.disk_bytes <= free_bytes:
        return []
    return [Shortage("disk", "output", output.disk_bytes - free_bytes)]
