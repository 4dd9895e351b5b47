"""How fast a run can be, and what will hold it back: estimates, with their sources, for choosing a store and a layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from m2ray.batches import LayerSpan, TensorRow
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device
from m2ray.planning.hardware import GPU_MODELS, find_gpu_model
from m2ray.planning.memory import ModelShape
from m2ray.planning.output import IDS_BYTES_A_ROW, row_bytes

SUSTAINED_SHARE = 0.23
"""Of the peak bfloat16 operations: 230 of 989 TFLOP/s, measured on an H200 with one real-size MiniMax-M2 layer, 16,384 tokens,
grouped experts, not compiled. Compiled it was 0.44."""

COPY_BYTES_PER_S = 51 * 2**30
"""From one GPU to pinned host memory, measured on an H200 behind PCIe 5."""

Limit = Literal["computation", "device_to_host_copy", "store"]


@dataclass(frozen=True)
class RatePlan:
    """Speeds of all chains together, in real tokens a second.

    Attributes:
        tokens_per_s: what is assumed: stated by the user, or estimated from the computation; None where neither is known.
        is_stated: whether the user stated it.
        store_bytes_per_s: what the store must take at that rate; None where the rate is not known.
        limits: tokens a second that each resource allows, as far as it is known.
        limiting: the one that allows least.
        duration_s: of the given prompts at that least rate; None without prompts or a rate.
    """

    tokens_per_s: float | None
    is_stated: bool
    store_bytes_per_s: float | None
    limits: Mapping[Limit, float]
    limiting: Limit | None
    duration_s: float | None


@dataclass(frozen=True)
class PlacedSpan:
    """A span on its device, which is number `place` of its chain."""

    replica: int
    stage: int
    place: int
    device: Device
    span: LayerSpan


def plan_rates(demand: Demand, placed: Sequence[PlacedSpan], tokens: int | None, padding_waste: float) -> RatePlan:
    """What the layout and the assumptions allow.

    Args:
        demand: the model and what is asked of it.
        placed: every span of every chain.
        tokens: real tokens of the prompts, if they are known.
        padding_waste: share of computed tokens that are padding.
    """
    options = demand.options
    token_bytes = sum(row_bytes(part) + IDS_BYTES_A_ROW for part in options.parts)
    computed = options.tokens_per_s or _computed_tokens_per_s(demand, placed, padding_waste)
    limits: dict[Limit, float] = {}
    if computed is not None:
        limits["computation"] = computed
    copied = _copied_tokens_per_s(demand, placed)
    if copied is not None:
        limits["device_to_host_copy"] = copied
    if options.store_bytes_per_s is not None:
        limits["store"] = options.store_bytes_per_s / token_bytes
    limiting = None if computed is None else _least(limits)
    return RatePlan(
        tokens_per_s=computed,
        is_stated=options.tokens_per_s is not None,
        store_bytes_per_s=None if computed is None else computed * token_bytes,
        limits=limits,
        limiting=limiting,
        duration_s=None if tokens is None or limiting is None else tokens / limits[limiting],
    )


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


def _computed_tokens_per_s(demand: Demand, placed: Sequence[PlacedSpan], padding_waste: float) -> float | None:
    """Of all chains: each is as fast as its slowest stage, and a stage's GPUs work one after the other. None on unknown GPUs."""
    seconds: dict[tuple[int, int], float] = {}
    for each in placed:
        model = find_gpu_model(each.device.gpu.name) if each.device.gpu else None
        if model is None:
            return None
        active = active_elements(demand.rows(each.span), demand.shape)
        stage = (each.replica, each.stage)
        seconds[stage] = seconds.get(stage, 0.0) + 2 * active / (GPU_MODELS[model].bf16_flops * SUSTAINED_SHARE)
    slowest: dict[int, float] = {}
    for (replica, _), stage_s in seconds.items():
        slowest[replica] = max(slowest.get(replica, 0.0), stage_s)
    return sum((1 - padding_waste) / stage_s for stage_s in slowest.values()) or None


def _copied_tokens_per_s(demand: Demand, placed: Sequence[PlacedSpan]) -> float | None:
    """Of all chains, by the GPU that copies most: captured rows, and the hidden states that leave it."""
    most: dict[int, int] = {}
    for each in placed:
        if each.device.gpu is None:
            return None
        copied = sum(demand.row_bytes(each.span)) + demand.table.hidden_size * demand.itemsize_bytes
        most[each.replica] = max(most.get(each.replica, 0), copied)
    return sum(COPY_BYTES_PER_S / copied for copied in most.values()) or None
