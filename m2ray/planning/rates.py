"""How fast a run can be, and what will hold it back: estimates, with their sources, for choosing a store and a layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from m2ray.batches import PromptStats, TensorRow
from m2ray.planning.demand import Demand
from m2ray.planning.devices import DevicePlan
from m2ray.planning.hardware import GPU_MODELS, find_gpu_model
from m2ray.planning.memory import ModelShape
from m2ray.planning.output import stored_row_bytes

SUSTAINED_SHARE = {False: 0.22, True: 0.39}
"""Of the peak bfloat16 operations, not compiled and compiled: two for each weight that a token meets, on an H200 with real-size
MiniMax-M2 layers, 8 x 2048 tokens, grouped experts, 23.7 and 13.3 ms a layer (benchmarks/results/gpu_stage_h200.json)."""

COPY_BYTES_PER_S = 51 * 2**30
"""Between one GPU and pinned host memory, either way, measured on an H200 behind PCIe 5."""

Limit = Literal["computation", "device_to_host_copy", "offload", "encoder", "store"]


@dataclass(frozen=True)
class RatePlan:
    """Speeds of all chains together, in real tokens a second.

    Attributes:
        tokens_per_s: what is assumed: stated by the user, or estimated from the computation; None where neither is known.
        is_stated: whether the user stated it.
        is_measured: whether it comes of a profile that `m2ray bench` took.
        store_bytes_per_s: what the store must take at that rate; None where the rate is not known.
        limits: tokens a second that each resource allows, where it is known.
        limiting: the one that allows least, of the stages' own with the time to fill and drain the chains.
        filled_share: of the time in which a chain works, the share in which each stage does: S stages need M + S - 1 steps for M
            micro-batches; None without prompts.
        duration_s: of the given prompts at that least rate, with the time to fill and drain the chains unless the rate was stated; None
            without prompts or a rate.
    """

    tokens_per_s: float | None
    is_stated: bool
    is_measured: bool
    store_bytes_per_s: float | None
    limits: Mapping[Limit, float]
    limiting: Limit | None
    filled_share: float | None
    duration_s: float | None


def plan_rates(demand: Demand, placed: Sequence[DevicePlan], prompts: PromptStats | None) -> RatePlan:
    """What the layout and the assumptions, or a profile's measurements, allow.

    Args:
        demand: the model and what is asked of it.
        placed: every span of every chain.
        prompts: what the survey found, if there was one.

    Raises:
        ConfigError: the profile is of another GPU or dtype.
    """
    options, assumed = demand.options, demand.assumed
    padding_waste = prompts.padding_waste if prompts else 0.0
    if assumed.profile:
        assumed.profile.require(options.compute_dtype, [each.device.gpu.name if each.device.gpu else None for each in placed])
    rows_a_token = prompts.rows_a_token if prompts else 1.0
    token_bytes = rows_a_token * sum(stored_row_bytes(part, options.compression) for part in options.parts)
    computed = assumed.tokens_per_s or _computed_tokens_per_s(demand, placed, padding_waste)
    found: dict[Limit, float | None] = {
        "computation": computed,
        "device_to_host_copy": _copied_tokens_per_s(demand, placed, rows_a_token),
        "offload": _offloaded_tokens_per_s(demand, placed, padding_waste),
        "encoder": _encoded_tokens_per_s(demand, placed, rows_a_token),
        "store": _stored_tokens_per_s(demand, token_bytes),
    }
    limits = {name: rate for name, rate in found.items() if rate is not None}
    filled_share = _filled_share(placed, prompts) if prompts else None
    # A stage that waits for its first micro-batch does nothing; the store meanwhile takes what the stages before it give.
    busy_share = 1.0 if assumed.tokens_per_s or filled_share is None else filled_share
    reached = {name: rate if name == "store" else rate * busy_share for name, rate in limits.items()}
    limiting = None if computed is None else _least(reached)
    return RatePlan(
        tokens_per_s=computed,
        is_stated=assumed.tokens_per_s is not None,
        is_measured=assumed.tokens_per_s is None and assumed.profile is not None,
        store_bytes_per_s=None if computed is None else computed * token_bytes,
        limits=limits,
        limiting=limiting,
        filled_share=filled_share,
        duration_s=None if prompts is None or limiting is None else prompts.tokens / reached[limiting],
    )


def _filled_share(placed: Sequence[DevicePlan], prompts: PromptStats) -> float | None:
    """Micro-batches shared evenly by the replicas; None where nothing is placed."""
    if not placed or not prompts.micro_batches:
        return None
    num_replicas = len({each.replica for each in placed})
    num_stages = len({(each.replica, each.stage) for each in placed}) / num_replicas
    each_has = max(1.0, prompts.micro_batches / num_replicas)
    return each_has / (each_has + num_stages - 1)


def _least(limits: Mapping[Limit, float]) -> Limit:
    return min(limits, key=lambda name: limits[name])


def active_elements(rows: Sequence[TensorRow], shape: ModelShape) -> float:
    """Weights that one token is multiplied with: of stacked experts [E, rows, columns] only the share that is chosen."""
    chosen = shape.experts_per_token / shape.num_experts if shape.num_experts else 1.0
    return sum(
        row.num_elements * (chosen if len(row.shape) == 3 and row.shape[0] == shape.num_experts else 1.0)
        for row in rows
        if row.role == "layer"
    )


def _computed_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], padding_waste: float) -> float | None:
    """Of all chains: each is as fast as its slowest stage, and a stage's GPUs work one after the other. None on unknown GPUs."""
    seconds: dict[tuple[int, int], float] = {}
    for each in placed:
        rate = _operations_per_s(demand, each)
        if rate is None:
            return None
        active = active_elements(demand.rows(each.held), demand.shape)
        stage = (each.replica, each.stage)
        seconds[stage] = seconds.get(stage, 0.0) + 2 * active / rate
    slowest: dict[int, float] = {}
    for (replica, _), stage_s in seconds.items():
        slowest[replica] = max(slowest.get(replica, 0.0), stage_s)
    return sum((1 - padding_waste) / stage_s for stage_s in slowest.values()) or None


def _operations_per_s(demand: Demand, placed: DevicePlan) -> float | None:
    """As measured, or estimated by the GPU's name."""
    compiled = demand.options.compile
    if demand.assumed.profile:
        return demand.assumed.profile.operations_per_s(compiled=compiled)
    model = find_gpu_model(placed.device.gpu.name) if placed.device.gpu else None
    return None if model is None else GPU_MODELS[model].bf16_flops * SUSTAINED_SHARE[compiled]


def _copied_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], rows_a_token: float) -> float | None:
    """Of all chains, by the GPU that copies most: captured rows, and the hidden states that leave it."""
    profile = demand.assumed.profile
    rate = COPY_BYTES_PER_S if profile is None else profile.copy_bytes_per_s
    if rate is None or not all(each.device.gpu for each in placed):
        return None
    most: dict[int, float] = {}
    for each in placed:
        copied = rows_a_token * sum(demand.row_bytes(each.held)) + demand.table.handed_bytes(demand.itemsize_bytes)
        most[each.replica] = max(most.get(each.replica, 0.0), copied)
    return sum(rate / copied for copied in most.values()) or None


def _offloaded_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], padding_waste: float) -> float | None:
    """Of all chains, by the GPU that is brought most; None where none is. A disk counts as its profile says, else as the bus it comes by."""
    profile = demand.assumed.profile
    bus = COPY_BYTES_PER_S if profile is None or profile.copy_bytes_per_s is None else profile.copy_bytes_per_s
    disk = bus if profile is None or profile.read_bytes_per_s is None else min(bus, profile.read_bytes_per_s)
    slowest: dict[int, float] = {}
    for each in placed:
        if each.residency:
            seconds = demand.bytes_in(each.residency, "host") / bus + demand.bytes_in(each.residency, "disk") / disk
            slowest[each.replica] = max(slowest.get(each.replica, 0.0), seconds)
    return sum(demand.options.batch_tokens * (1 - padding_waste) / seconds for seconds in slowest.values()) or None


def _encoded_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], rows_a_token: float) -> float | None:
    """Of all chains, by the stage that encodes most; None without a profile or rows. A thread takes whole parts: no more help than parts."""
    profile = demand.assumed.profile
    if profile is None or not rows_a_token:
        return None
    parts: dict[tuple[int, int], list[int]] = {}
    for each in placed:
        parts.setdefault((each.replica, each.stage), []).extend(demand.row_bytes(each.held))
    slowest: dict[int, float] = {}
    for (replica, _), row_sizes in parts.items():
        if row_sizes:
            threads = min(profile.writer_threads, len(row_sizes))
            rate = profile.encode_bytes_per_s * threads / (rows_a_token * sum(row_sizes))
            slowest[replica] = min(slowest.get(replica, rate), rate)
    return sum(slowest.values()) or None


def _stored_tokens_per_s(demand: Demand, token_bytes: float) -> float | None:
    """By what the store is said to take, or what it took from the one machine of the profile."""
    assumed = demand.assumed
    rate = assumed.store_bytes_per_s or (assumed.profile.store_bytes_per_s if assumed.profile else None)
    return None if rate is None or not token_bytes else rate / token_bytes
