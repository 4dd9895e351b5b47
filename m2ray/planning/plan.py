"""The plan of a run: what goes where, what it takes, whether it fits. Read `plan_run` first."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, get_args

from m2ray.batches import LayerSpan
from m2ray.errors import ClusterError, ConfigError, raise_all
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, chain_devices
from m2ray.planning.hardware import FLASH_PACKAGE, Cluster
from m2ray.planning.memory import OFFLOAD_READ_BYTES, Memory, cpu_memory, gpu_host_memory, gpu_memory, weight_bytes, window
from m2ray.planning.output import OutputPlan, PromptStats, plan_output
from m2ray.planning.partition import DeviceMap
from m2ray.planning.rates import PlacedSpan, RatePlan, SpiltBytes, plan_rates
from m2ray.planning.remedies import STEP_TOKENS, OffloadTrial, Remedy, find_remedies
from m2ray.planning.spill import Spill, Spills, spill, to_disk

Resource = Literal["gpu_memory", "host_memory", "shared_memory", "disk"]


@dataclass(frozen=True)
class WeightsPlan:
    """The weights. All bytes are exact.

    Attributes:
        disk_bytes: every tensor of the checkpoint, scales included, loaded or not.
        parameters: of the whole model; multi-token-prediction modules and FP8 scales are not counted.
        compute_bytes: of all parameters in the compute dtype, without exception.
        loaded_bytes: of what one chain loads: the layers that are run and the embedding; float32 where a tensor stays so.
        layer_bytes: in memory, of each layer of the model.
        embedding_bytes, final_norm_bytes: in memory, loaded or not.
        head_disk_bytes, unused_disk_bytes: on disk, never loaded.
    """

    disk_bytes: int
    parameters: int
    compute_bytes: int
    loaded_bytes: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    final_norm_bytes: int
    head_disk_bytes: int
    unused_disk_bytes: int


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
class Plan:
    """The whole plan. Where GPU memory is short there are no `stages`, and `gpus` tell what each would need besides weights."""

    demand: Demand
    cluster: Cluster
    prompts: PromptStats | None
    chains: tuple[tuple[Device, ...], ...]
    weights: WeightsPlan
    gpus: tuple[GpuPlan, ...]
    stages: tuple[StagePlan, ...]
    nodes: tuple[NodePlan, ...]
    output: OutputPlan | None
    rates: RatePlan
    shortages: tuple[Shortage, ...]
    remedies: tuple[Remedy, ...]

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def short_by_bytes(self) -> int:
        """Of the first resource that is short, in this order: GPU memory, host memory, /dev/shm, disk; 0 if everything fits."""
        return sum(shortage.short_by_bytes for shortage in self.shortages if shortage.resource == self.shortages[0].resource)

    def require_fit(self) -> None:
        """Raise ClusterError, with what is missing where and what would help, unless the plan fits."""
        if not self.fits:
            short = "; ".join(
                f"{each.short_by_bytes:,} bytes of {each.resource.replace('_', ' ')} ({each.where})" for each in self.shortages
            )
            raise ClusterError(
                f"The plan does not fit: {short} too little.",
                " ".join(remedy.text for remedy in self.remedies) or "`m2ray plan` shows what takes how much.",
            )

    @property
    def limiting_resource(self) -> str | None:
        """What is short, or else what will hold the run back; None where that is not known."""
        return self.shortages[0].resource if self.shortages else self.rates.limiting


def plan_run(
    demand: Demand, cluster: Cluster, prompts: PromptStats | None = None, chains: Sequence[Sequence[Device]] | None = None
) -> Plan:
    """Lay the model out over the cluster and count what everything takes. A model that does not fit is no error here.

    Args:
        demand: the model's tensors and dimensions, and what is asked for.
        cluster: where it is to run.
        prompts: what the survey found; without it nothing is said of the output's size.
        chains: the devices of each chain, in order, where they are given already; else they are chosen from the cluster.

    Raises:
        ConfigError: options contradict each other, the cluster or the profile.
        ClusterError: there are fewer GPUs than stages, or nodes that cannot run the attention.
    """
    device_map = demand.options.chains.device_map
    if device_map not in get_args(DeviceMap) and not device_map.startswith("cuda:"):
        raise ConfigError(f"device_map = {device_map!r} is unknown.", f"Use {', '.join(get_args(DeviceMap))} or cuda:0.")
    chains = tuple(map(tuple, chains or chain_devices(cluster, demand.num_layers, demand.options.chains)))
    _require_attention(demand, chains)
    layout = _lay_out(demand, cluster, chains, prompts)

    def fits(changed: Demand, on: Cluster, over: Sequence[Sequence[Device]]) -> bool:
        return not _lay_out(changed, on, over, prompts).shortages

    def try_offload(changed: Demand) -> OffloadTrial:
        tried = _lay_out(changed, cluster, chains, prompts)
        host_bytes = sum(stage.host.running.get("offloaded", 0) for stage in tried.stages)
        return OffloadTrial(not tried.shortages, host_bytes, sum(node.disk_bytes for node in tried.nodes))

    waste = layout.output.padding_waste if layout.output else 0.0
    short = {shortage.resource for shortage in layout.shortages}
    return Plan(
        demand=demand,
        cluster=cluster,
        prompts=prompts,
        chains=chains,
        weights=_weights(demand),
        gpus=tuple(_gpus(demand, chains, layout)),
        stages=layout.stages,
        nodes=layout.nodes,
        output=layout.output,
        rates=plan_rates(demand, layout.placed, prompts, waste, _spilt_bytes(demand, layout.spills)),
        shortages=layout.shortages,
        remedies=find_remedies(demand, cluster, chains, short, fits, try_offload) if short else (),
    )


def _spills(demand: Demand, cluster: Cluster, placed: Sequence[PlacedSpan]) -> Spills:
    """What is not on the GPUs, dealt out between each node's memory and its disk."""
    spills = spill(demand, placed)
    without = _nodes(demand, cluster, tuple(_stages(demand, placed, {})), {}) if spills else ()
    for node, planned in zip(cluster.nodes, without, strict=False):
        keys = {(each.replica, each.place) for each in placed if each.device.node.name == node.name} & spills.keys()
        here = {key: spills[key] for key in keys}
        spills = {**spills, **to_disk(demand, here, node, planned.host_bytes + OFFLOAD_READ_BYTES * len(here))}
    return spills


def _spilt_bytes(demand: Demand, spills: Spills) -> SpiltBytes:
    return {key: (demand.bytes_of(spilt.in_host), demand.bytes_of(spilt.on_disk)) for key, spilt in spills.items()}


def _require_attention(demand: Demand, chains: Sequence[Sequence[Device]]) -> None:
    """Raise ClusterError, all at once, for what keeps the attention from these devices, as far as is known of them."""
    if demand.shape.attn_implementation != "flash_attention_2":
        return
    remedy = 'Set attn_implementation = "sdpa".'
    if not all(device.gpu for chain in chains for device in chain):
        raise ClusterError('attn_implementation = "flash_attention_2" needs GPUs, and there are none.', remedy)
    nodes = {device.node.name: device.node for chain in chains for device in chain}
    raise_all(
        [
            ClusterError(
                f'attn_implementation = "flash_attention_2": the package {FLASH_PACKAGE} is not installed on node {name}.',
                f"Install it there. {remedy}",
            )
            for name, node in nodes.items()
            if node.versions and FLASH_PACKAGE not in node.versions
        ]
    )


def most_replicas(demand: Demand, cluster: Cluster) -> int:
    """What `replicas = "auto"` means: the most chains that fit side by side, at least 1. Without GPUs 1."""
    for replicas in range(cluster.num_gpus, 1, -1):
        chain_options = replace(demand.options.chains, replicas=replicas)
        try:
            chains = chain_devices(cluster, demand.num_layers, chain_options)
        except ClusterError:
            continue
        if not _lay_out(demand.with_replicas(replicas), cluster, chains, None).shortages:
            return replicas
    return 1


@dataclass(frozen=True)
class _Layout:
    """Where everything lies, and what is short for it. Nothing is placed where GPU memory is short."""

    placed: tuple[PlacedSpan, ...]
    spills: Spills
    stages: tuple[StagePlan, ...]
    nodes: tuple[NodePlan, ...]
    output: OutputPlan | None
    shortages: tuple[Shortage, ...]


def _lay_out(demand: Demand, cluster: Cluster, chains: Sequence[Sequence[Device]], prompts: PromptStats | None) -> _Layout:
    options = demand.options
    short_bytes = sum(demand.short_bytes(chain) for chain in chains)
    placed = () if short_bytes else tuple(each for replica, chain in enumerate(chains) for each in _place(demand, replica, chain))
    spills = _spills(demand, cluster, placed)
    stages = tuple(_stages(demand, placed, spills))
    nodes = _nodes(demand, cluster, stages, _disk_bytes(demand, placed, spills))
    output = plan_output(options.parts, prompts, options.price_per_gb_month, options.compression) if prompts else None
    shortages = [Shortage("gpu_memory", "all GPUs together", short_bytes)] if short_bytes else []
    shortages += [*_node_shortages(cluster, nodes), *_disk_shortages(demand, output)]
    return _Layout(placed, spills, stages, nodes, output, tuple(shortages))


def most_batch_tokens(demand: Demand, cluster: Cluster, at_most: int) -> int | None:
    """The largest micro-batch, `at_most` or in steps of 256 tokens less, for which all memory suffices; None if none does.

    Raises:
        ConfigError, ClusterError: as `plan_run`.
    """
    chains = chain_devices(cluster, demand.num_layers, demand.options.chains)
    sizes = [*range(STEP_TOKENS, at_most, STEP_TOKENS), at_most]
    too_large = bisect_left(sizes, x=True, key=lambda size: bool(_lay_out(demand.with_batch_tokens(size), cluster, chains, None).shortages))
    return sizes[too_large - 1] if too_large else None


def _place(demand: Demand, replica: int, chain: Sequence[Device]) -> Iterator[PlacedSpan]:
    size = demand.options.chains.gpus_per_stage if chain[0].gpu else 1
    for held in demand.split(chain):
        yield PlacedSpan(replica, held.device // size, held.device, chain[held.device], held.span)


def _gpus(demand: Demand, chains: Sequence[Sequence[Device]], layout: _Layout) -> Iterator[GpuPlan]:
    """Every GPU of every chain, in order; those that stay empty take nothing."""
    size = demand.options.chains.gpus_per_stage
    spans = {(each.replica, each.place): each.span for each in layout.placed}
    for replica, chain in enumerate(chains):
        for place, device in enumerate(chain):
            if device.gpu is None:
                continue
            span = spans.get((replica, place))
            if span is None:
                yield GpuPlan(replica, place // size, device, None, Memory({} if layout.placed else demand.overhead, {}))
                continue
            spilt = layout.spills.get((replica, place), Spill())
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
        if node.disk_free_bytes is not None and planned.disk_bytes > node.disk_free_bytes:
            disk.append(Shortage("disk", node.name, planned.disk_bytes - node.disk_free_bytes))
    return [*host, *shared, *disk]


def _disk_shortages(demand: Demand, output: OutputPlan | None) -> list[Shortage]:
    free_bytes = demand.options.disk_free_bytes
    if output is None or free_bytes is None or output.disk_bytes <= free_bytes:
        return []
    return [Shortage("disk", "output", output.disk_bytes - free_bytes)]


def _weights(demand: Demand) -> WeightsPlan:
    table, itemsize = demand.table, demand.itemsize_bytes
    counted = [row for row in table.rows if row.role != "unused"]
    parameters = sum(row.num_elements for row in counted)
    return WeightsPlan(
        disk_bytes=table.disk_bytes,
        parameters=parameters,
        compute_bytes=parameters * itemsize,
        loaded_bytes=weight_bytes(demand.rows(LayerSpan(0, demand.num_layers)), itemsize),
        layer_bytes=table.layer_bytes(itemsize),
        embedding_bytes=table.role_bytes("embedding", itemsize),
        final_norm_bytes=table.role_bytes("final_norm", itemsize),
        head_disk_bytes=sum(row.disk_bytes for row in table.rows if row.role == "head"),
        unused_disk_bytes=sum(row.disk_bytes for row in table.rows if row.role == "unused"),
    )
