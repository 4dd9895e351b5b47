"""The plan of a run: what goes where, what it takes, whether it fits. Read `plan_run` first."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import get_args

from m2ray.batches import LayerSpan, PromptStats
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError, ConfigError, did_you_mean, raise_all
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device, DevicePlan, chain_devices
from m2ray.planning.hardware import FLASH_PACKAGE, GPU_MODELS, Cluster, find_gpu_model
from m2ray.planning.memory import weight_bytes
from m2ray.planning.partition import DeviceMap
from m2ray.planning.placing import Placing, disk_shortages, gpus_of, place_all
from m2ray.planning.rates import RatePlan, plan_rates
from m2ray.planning.remedies import STEP_TOKENS, Remedy, find_remedies
from m2ray.planning.waves import Wave, waves

_WHAT_TAKES_IT = "`m2ray plan` shows what takes how much."


@dataclass(frozen=True)
class WeightsPlan:
    """The weights. All bytes are exact.

    Attributes:
        disk_bytes: every tensor of the checkpoint, scales included, loaded or not.
        parameters: of the whole model; multi-token-prediction modules and FP8 scales are not counted.
        compute_bytes: of all parameters in the compute dtype, without exception; of those that stay packed with their scales.
        loaded_bytes: of what one chain loads: the layers that are run and the embedding; float32 where a tensor stays so.
        layer_bytes: in memory, of each layer of the model.
        embedding_bytes, final_norm_bytes: in memory, loaded or not.
        head_disk_bytes, unused_disk_bytes: on disk, never loaded.
        layouts: by how tensors are packed on disk, "" for those that are not quantised: bytes of them on disk and in the compute dtype.
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
    layouts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, repr=False)
class Plan(Placing):
    """The whole plan. Where GPU memory is short there are no `stages`, and `gpus` tell what each would need besides weights.

    It shows itself as `m2ray plan` prints it.
    """

    demand: Demand
    cluster: Cluster
    prompts: PromptStats | None
    chains: tuple[tuple[Device, ...], ...]
    weights: WeightsPlan
    gpus: tuple[DevicePlan, ...]
    wave: Wave
    rates: RatePlan
    remedies: tuple[Remedy, ...]

    def __repr__(self) -> str:
        from m2ray.planning.layout import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def short_by_bytes(self) -> int:
        """Of the first resource that is short, in this order: GPU memory, host memory, /dev/shm, disk; 0 if everything fits."""
        return sum(shortage.short_by_bytes for shortage in self.shortages if shortage.resource == self.shortages[0].resource)

    def require_fit(self, *, has_begun: bool = False) -> None:
        """Raise ClusterError, with what is missing where and what would help, unless the plan fits.

        Args:
            has_begun: the run is claimed: it takes no other row options, and no other output.
        """
        if not self.fits:
            fixed = (*ExtractConfig.row_options(), "output") if has_begun else ()
            remedies = [remedy.text for remedy in self.remedies if remedy.option not in fixed]
            short = "; ".join(
                f"{each.short_by_bytes:,} bytes of {each.resource.replace('_', ' ')} ({each.where})" for each in self.shortages
            )
            raise ClusterError(
                f"The plan does not fit: {short} too little.",
                " ".join(remedies) or ("Free as much, or begin another run with another output." if has_begun else _WHAT_TAKES_IT),
            )

    @property
    def run_tokens_per_s(self) -> float | None:
        """Real tokens a second of the whole run, from loaded stages to the last commit; without prompts, of the computation alone. None: not known."""
        duration_s = self.rates.duration_s
        return self.rates.tokens_per_s if duration_s is None or self.prompts is None else self.prompts.tokens / duration_s

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
        ConfigError: options contradict each other, the cluster or the profile; or layers are to be kept on a disk that lies in memory.
        ClusterError: there are fewer GPUs than stages, nodes that cannot run the attention, or devices without FP8 where it is asked for.
    """
    device_map = demand.options.device_map
    if device_map not in get_args(DeviceMap) and not device_map.startswith("cuda:"):
        raise ConfigError(
            f"device_map = {device_map!r} is unknown.",
            f"{did_you_mean(device_map, get_args(DeviceMap))}Use {', '.join(get_args(DeviceMap))} or cuda:0.",
        )
    chains = tuple(map(tuple, chains or chain_devices(cluster, demand.num_layers, demand.options)))
    raise_all([*_without_attention(demand, chains), *_without_float8(demand, chains)])
    demand, wave, placing = _with_wave(demand, cluster, chains, prompts)
    _require_disks(cluster, placing)
    short = {shortage.resource for shortage in placing.shortages}
    return Plan(
        **vars(placing),
        demand=demand,
        cluster=cluster,
        prompts=prompts,
        chains=chains,
        weights=_weights(demand),
        gpus=tuple(gpus_of(demand, chains, placing)),
        wave=wave,
        rates=plan_rates(demand, placing.placed, prompts, sum(device.gpu is not None for chain in chains for device in chain)),
        remedies=find_remedies(demand, cluster, chains, prompts, short) if short else (),
    )


def _with_wave(
    demand: Demand, cluster: Cluster, chains: Sequence[Sequence[Device]], prompts: PromptStats | None
) -> tuple[Demand, Wave, Placing]:
    """The demand with the largest wave, up to the best, that leaves everything with room and on the devices whatever is there without one."""
    demand = replace(demand, wave_tokens=0)
    without = place_all(demand, cluster, chains, prompts)
    for wave in waves(demand, without.placed, prompts):
        asked = replace(demand, wave_tokens=wave.tokens)
        placing = place_all(asked, cluster, chains, prompts) if wave.tokens else without
        if not wave.tokens or (not placing.shortages and placing.brings == without.brings):
            break
    return asked, wave, placing


def of_another_job(plan: Plan, demand: Demand, prompts: PromptStats) -> Plan:
    """The plan of a job on a chain that stands already, as `plan` has it: only the output is still to be planned."""
    output = demand.output(prompts)
    return replace(plan, demand=demand, prompts=prompts, output=output, shortages=tuple(disk_shortages(demand, output)), remedies=())


def _without_attention(demand: Demand, chains: Sequence[Sequence[Device]]) -> Iterator[ClusterError]:
    """All that is known to keep the attention from these devices."""
    if demand.options.attn_implementation != "flash_attention_2":
        return
    remedy = 'Set attn_implementation = "sdpa".'
    if not all(device.gpu for chain in chains for device in chain):
        yield ClusterError('attn_implementation = "flash_attention_2" needs GPUs, and there are none.', remedy)
        return
    nodes = {device.node.name: device.node for chain in chains for device in chain}
    for name, node in nodes.items():
        if node.versions and FLASH_PACKAGE not in node.versions:
            what = f'attn_implementation = "flash_attention_2": the package {FLASH_PACKAGE} is not installed on node {name}.'
            yield ClusterError(what, f"Install it there. {remedy}")


def _without_float8(demand: Demand, chains: Sequence[Sequence[Device]]) -> Iterator[ClusterError]:
    """Devices that are known not to multiply FP8, where that is asked for; a stage looks at those whose names nobody knows."""
    if demand.options.compute_dtype != "float8":
        return
    gpus = {device.gpu.name if device.gpu else None for chain in chains for device in chain}
    lacking = [name for name in gpus if name and (model := find_gpu_model(name)) and not GPU_MODELS[model].has_fp8]
    if None in gpus or lacking:
        has = "there are none" if None in gpus else f"{' and '.join(sorted(lacking))} multiplies none"
        yield ClusterError(
            f'compute_dtype = "float8" needs GPUs that multiply FP8 (compute capability 8.9 and above), and {has}.',
            'Set compute_dtype = "bfloat16".',
        )


def _require_disks(cluster: Cluster, placing: Placing) -> None:
    """Raise ConfigError, all at once, for nodes whose disk for layers lies in memory: it would take what is planned for others."""
    raise_all(
        [
            ConfigError(
                f"offload_folder: {planned.disk_bytes:,} bytes of layers would be copied into memory, since it lies on a file system in memory "
                f"(tmpfs) on node {node.name}.",
                "Set it to a folder on a disk, or leave it out.",
            )
            for node, planned in zip(cluster.nodes, placing.nodes, strict=True)
            if planned.disk_bytes and node.disk_in_memory
        ]
    )


def most_replicas(demand: Demand, cluster: Cluster) -> int:
    """What `replicas = "auto"` means: the most chains that fit side by side as fast as they can be, at least 1. Without GPUs 1."""
    for asked in demand.narrowed():
        for replicas in range(cluster.num_gpus, 0, -1):
            changed = asked.asking(replicas=replicas)
            try:
                chains = chain_devices(cluster, demand.num_layers, changed.options)
            except ClusterError:
                continue
            if not place_all(changed, cluster, chains, None).shortages:
                return replicas
    return 1


def most_batch_tokens(demand: Demand, cluster: Cluster, at_most: int, least: int) -> int | None:
    """The largest micro-batch, `at_most` or in steps of 256 tokens less, for which all memory suffices; None if none does.

    Weights get their place first: where `least` tokens leave them room to lie ready, or else on the devices, no more are taken than leave it too.

    Raises:
        ConfigError, ClusterError: as `plan_run`.
    """
    chains = chain_devices(cluster, demand.num_layers, demand.options)
    sizes = [*range(STEP_TOKENS, at_most, STEP_TOKENS), at_most]
    found = None
    for asked in demand.narrowed():
        too_large = bisect_left(
            sizes, x=True, key=lambda size: bool(place_all(asked.asking(batch_tokens=size), cluster, chains, None).shortages)
        )
        found = sizes[too_large - 1] if too_large else None
        if found is not None and found >= least:
            break
    return found


def _weights(demand: Demand) -> WeightsPlan:
    table, itemsize = demand.table, demand.itemsize_bytes
    counted = [row for row in table.rows if row.role != "unused"]
    parameters = sum(row.num_elements for row in counted)
    return WeightsPlan(
        disk_bytes=table.disk_bytes,
        parameters=parameters,
        compute_bytes=sum(row.disk_bytes if row.stays_packed else row.num_elements * itemsize for row in counted),
        loaded_bytes=weight_bytes(demand.rows(LayerSpan(0, demand.num_layers)), itemsize),
        layer_bytes=table.layer_bytes(itemsize),
        embedding_bytes=table.role_bytes("embedding", itemsize),
        final_norm_bytes=table.role_bytes("final_norm", itemsize),
        head_disk_bytes=sum(row.disk_bytes for row in table.rows if row.role == "head"),
        unused_disk_bytes=sum(row.disk_bytes for row in table.rows if row.role == "unused"),
        layouts=table.bytes_by_method(itemsize),
    )
