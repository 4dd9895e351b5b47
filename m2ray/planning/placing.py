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
from m2ray.planning.memory import Memory, gpu_host_memory, gpu_memory, window
from m2ray.planning.output import OutputPlan
from m2ray.planning.residency import deal, held_bytes, readers_bytes, shared_bytes, with_files
from m2ray.sizes import MaxMemory

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

    `shm_bytes`, hidden states in /dev/shm, is part of `host_bytes`; `disk_bytes` are layers that are copied to `offload_folder` there.
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

    @property
    def brings(self) -> bool:
        """Whether any layer is brought to its device in turn. Without a GPU the host is the device."""
        return any(
            place == "checkpoint" or (place == "host" and each.device.gpu) for each in self.placed for place in each.residency.values()
        )


def place_all(demand: Demand, cluster: Cluster, chains: Sequence[Sequence[Device]], prompts: PromptStats | None) -> Placing:
    """Deal the layers out over the chains, those without room on a device over hosts and files, and count what each holds."""
    dealt = [deal(demand, chain) for chain in chains]
    short_bytes = sum(short for short, _ in dealt)
    on_gpus = any(device.gpu for chain in chains for device in chain)
    is_short = bool(short_bytes) and (on_gpus or demand.options.max_memory != MaxMemory())
    placed = tuple(
        DevicePlan(replica, place // _size(demand, chain), place, chain[place], span, residency, demand.wave_tokens if residency else 0)
        for replica, (chain, (_, spans)) in enumerate(zip(chains, dealt, strict=True))
        for place, (span, residency) in spans.items()
        if not (is_short and on_gpus)
    )
    placed = _with_residency(demand, cluster, placed)
    stages = tuple(_stages(demand, placed))
    nodes = _nodes(demand, cluster, stages, placed)
    output = demand.output(prompts) if prompts else None
    shortages = []
    if is_short:
        shortages = [
            Shortage("gpu_memory", "all GPUs together", short_bytes)
            if on_gpus
            else Shortage("host_memory", "what max_memory leaves to all stages together", short_bytes)
        ]
    shortages += [*_node_shortages(cluster, nodes), *disk_shortages(demand, output)]
    return Placing(placed, stages, nodes, output, tuple(shortages))


def _size(demand: Demand, chain: Sequence[Device]) -> int:
    """Devices of a stage."""
    return demand.options.gpus_per_stage if chain[0].gpu else 1


def _with_residency(demand: Demand, cluster: Cluster, placed: Sequence[DevicePlan]) -> tuple[DevicePlan, ...]:
    """The devices, with what finds no room on them dealt out between each node's memory and files."""
    if demand.options.offload not in ("disk", "auto") or not any("host" in each.residency.values() for each in placed):
        return tuple(placed)
    in_files = [replace(each, residency=dict.fromkeys(each.residency if each.device.gpu else (), "checkpoint")) for each in placed]
    without = _nodes(demand, cluster, tuple(_stages(demand, in_files)), in_files)
    for node, planned in zip(cluster.nodes, without, strict=True):
        placed = with_files(demand, placed, node, planned.host_bytes)
    return tuple(placed)


def gpus_of(demand: Demand, chains: Sequence[Sequence[Device]], placing: Placing) -> Iterator[DevicePlan]:
    """Every GPU of every chain with its memory, in order; those that stay empty take nothing."""
    with_layers = {(each.replica, each.place): each for each in placing.placed}
    for replica, chain in enumerate(chains):
        for place, device in enumerate(chain):
            if device.gpu is None:
                continue
            found = with_layers.get((replica, place))
            if found is None:
                empty = Memory({} if placing.placed else demand.overhead, {})
                yield DevicePlan(replica, place // _size(demand, chain), place, device, None, memory=empty)
                continue
            held = held_bytes(demand, found.held, found.residency, device)
            captured_bytes, statistics_bytes = demand.captured_row_bytes(found.held), demand.statistics_on_device(found.held)
            memory = gpu_memory(held, demand.workload, captured_bytes, statistics_bytes, is_alone=demand.is_whole(found.held))
            yield replace(found, memory=memory)


def _stages(demand: Demand, placed: Sequence[DevicePlan]) -> Iterator[StagePlan]:
    for (replica, stage), group in groupby(placed, key=lambda each: (each.replica, each.stage)):
        of_stage = list(group)
        span = LayerSpan(of_stage[0].held.start, of_stage[-1].held.stop)
        statistics_bytes = demand.statistics_on_host(span)
        if of_stage[0].device.gpu:
            packed_bytes = sum(demand.bytes_in(each.residency, "host") for each in of_stage)
            wave_bytes = demand.wave_bytes(span) // 2 if span.start and any(each.residency for each in of_stage) else 0
            host = gpu_host_memory(
                demand.workload,
                demand.column_bytes(span),
                {"packed_layers": packed_bytes, "readers": readers_bytes(of_stage), "wave": wave_bytes},
                statistics_bytes,
            )
        else:
            device = of_stage[0].device
            residency = of_stage[0].residency
            host = demand.cpu_memory(held_bytes(demand, span, residency, device), device.node, span, residency)
        yield StagePlan(replica, stage, of_stage[0].device.node.name, span, host)


def _nodes(demand: Demand, cluster: Cluster, stages: Sequence[StagePlan], placed: Sequence[DevicePlan]) -> tuple[NodePlan, ...]:
    """Hidden states in flight may all be on one node; a chain of one stage has none. Of waves there are one a stage, and one to spare."""
    copied = demand.options.offload_folder is not None
    planned = []
    for node in cluster.nodes:
        here_placed = [each for each in placed if each.device.node.name == node.name]
        disk_bytes = sum(demand.bytes_in(each.residency, "checkpoint") for each in here_placed) if copied else 0
        here = [stage for stage in stages if stage.node == node.name]
        lengths = Counter(stage.replica for stage in stages)
        chains = {stage.replica for stage in here if lengths[stage.replica] > 1}
        wave_bytes = max((each.wave_tokens for each in placed), default=0) * demand.workload.token_bytes
        shm_bytes = sum(
            min(
                demand.options.in_flight_bytes,
                max(window(lengths[replica]) * demand.workload.hidden_bytes, (lengths[replica] + 1) * wave_bytes),
            )
            for replica in chains
        )
        host_bytes = sum(stage.host.peak_bytes for stage in here) - shared_bytes(demand, here_placed) + shm_bytes
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
