"""Where everything lies: the layers on the GPUs, what each stage and node holds, and what is short for it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from m2ray.batches import LayerSpan, PromptStats
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, DevicePlan
from m2ray.planning.hardware import Cluster
from m2ray.planning.memory import OFFLOAD_READ_BYTES, Memory, cpu_memory, gpu_host_memory, gpu_memory, window
from m2ray.planning.output import OutputPlan
from m2ray.planning.residency import in_host, with_disk

Resource = Literal["gpu_memory", "host_memory", "shared_memory", "disk"]


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

    placed: tuple[DevicePlan, ...]
    stages: tuple[StagePlan, ...]
    nodes: tuple[NodePlan, ...]
    output: OutputPlan | None
    shortages: tuple[Shortage, ...]


def place_all(demand: Demand, cluster: Cluster, chains: Sequence[Sequence[Device]], prompts: PromptStats | None) -> Placing:
    """Deal the layers out over the chains, those without room on a GPU over hosts and disks, and count what each device holds."""
    short_bytes = sum(demand.short_bytes(chain) for chain in chains)
    placed = () if short_bytes else tuple(each for replica, chain in enumerate(chains) for each in _place(demand, replica, chain))
    placed = _with_residency(demand, cluster, placed)
    stages = tuple(_stages(demand, placed))
    nodes = _nodes(demand, cluster, stages, placed)
    output = demand.output(prompts) if prompts else None
    shortages = [Shortage("gpu_memory", "all GPUs together", short_bytes)] if short_bytes else []
    shortages += [*_node_shortages(cluster, nodes), *disk_shortages(demand, output)]
    return Placing(placed, stages, nodes, output, tuple(shortages))


def _place(demand: Demand, replica: int, chain: Sequence[Device]) -> Iterator[DevicePlan]:
    size = demand.options.gpus_per_stage if chain[0].gpu else 1
    for place, span in demand.split(chain).items():
        yield DevicePlan(replica, place // size, place, chain[place], span)


def _with_residency(demand: Demand, cluster: Cluster, placed: Sequence[DevicePlan]) -> tuple[DevicePlan, ...]:
    """The devices, with what finds no room on them dealt out between each node's memory and its disk."""
    if demand.options.offload == "none":
        return tuple(placed)
    without = _nodes(demand, cluster, tuple(_stages(demand, placed)), placed)
    placed = in_host(demand, placed)
    for node, planned in zip(cluster.nodes, without, strict=True):
        num_readers = sum(bool(each.residency) for each in placed if each.device.node.name == node.name)
        if num_readers:
            placed = with_disk(demand, placed, node, planned.host_bytes + OFFLOAD_READ_BYTES * num_readers)
    return tuple(placed)


def gpus_of(demand: Demand, chains: Sequence[Sequence[Device]], placing: Placing) -> Iterator[DevicePlan]:
    """Every GPU of every chain with its memory, in order; those that stay empty take nothing."""
    size = demand.options.gpus_per_stage
    with_layers = {(each.replica, each.place): each for each in placing.placed}
    for replica, chain in enumerate(chains):
        for place, device in enumerate(chain):
            if device.gpu is None:
                continue
            found = with_layers.get((replica, place))
            if found is None:
                empty = Memory({} if placing.placed else demand.overhead, {})
                yield DevicePlan(replica, place // size, place, device, None, memory=empty)
                continue
            rows = [row for row in demand.rows(found.held) if row.layer not in found.residency]
            buffers_bytes = demand.buffers_bytes(found.held) if found.residency else 0
            row_bytes, statistics_bytes = demand.captured_row_bytes(found.held), demand.statistics_on_device(found.held)
            memory = gpu_memory(rows, demand.workload, row_bytes, buffers_bytes, statistics_bytes)
            yield replace(found, memory=memory)


def _stages(demand: Demand, placed: Sequence[DevicePlan]) -> Iterator[StagePlan]:
    for (replica, stage), group in groupby(placed, key=lambda each: (each.replica, each.stage)):
        of_stage = list(group)
        span = LayerSpan(of_stage[0].held.start, of_stage[-1].held.stop)
        statistics_bytes = demand.statistics_on_host(span)
        if of_stage[0].device.gpu:
            offloaded_bytes = sum(demand.bytes_in(each.residency, "host") for each in of_stage)
            readers_bytes = OFFLOAD_READ_BYTES * sum("disk" in each.residency.values() for each in of_stage)
            host = gpu_host_memory(demand.workload, demand.column_bytes(span), offloaded_bytes, readers_bytes, statistics_bytes)
        else:
            host = cpu_memory(
                demand.rows(span), demand.workload, demand.row_bytes(span), statistics_bytes + demand.statistics_on_device(span)
            )
        yield StagePlan(replica, stage, of_stage[0].device.node.name, span, host)


def _nodes(demand: Demand, cluster: Cluster, stages: Sequence[StagePlan], placed: Sequence[DevicePlan]) -> tuple[NodePlan, ...]:
    """Hidden states in flight may all be on one node; a chain of one stage has none."""
    planned = []
    for node in cluster.nodes:
        disk_bytes = sum(demand.bytes_in(each.residency, "disk") for each in placed if each.device.node.name == node.name)
        here = [stage for stage in stages if stage.node == node.name]
        lengths = Counter(stage.replica for stage in stages)
        chains = {stage.replica for stage in here if lengths[stage.replica] > 1}
        shm_bytes = sum(min(demand.options.in_flight_bytes, window(lengths[replica]) * demand.workload.hidden_bytes) for replica in chains)
        host_bytes = sum(stage.host.peak_bytes for stage in here) + shm_bytes
        planned.append(NodePlan(node.name, host_bytes, shm_bytes, disk_bytes))
    return tuple(planned)


def _node_shortages(cluster: Cluster, nodes: Sequence[NodePlan]) -> list[Shortage]:
    """Host memory of every node, then /dev/shm, then the disk, where they are known."""
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


def disk_shortages(demand: Demand, output: OutputPlan | None) -> list[Shortage]:
    """What the output's disk lacks."""
    free_bytes = demand.assumed.disk_free_bytes
    if output is None or free_bytes is None or output.disk_bytes <= free_bytes:
        return []
    return [Shortage("disk", "output", output.disk_bytes - free_bytes)]
