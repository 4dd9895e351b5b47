"""How fast a run can be, and what will hold it back: estimates, with their sources, for choosing a store and a layout."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from m2ray.batches import PromptStats
from m2ray.planning.batch_size import ON_GPU
from m2ray.planning.demand import Demand
from m2ray.planning.devices import DevicePlan
from m2ray.planning.output import stored_row_bytes
from m2ray.planning.passes import COPY_BYTES_PER_S, bringing_s, pass_s

Limit = Literal["computation", "device_to_host_copy", "offload", "encoder", "store"]

MEASURED_TOKENS = 16_384
"""Of the micro-batches by whose time a GPU's rate is known from its name (m2ray.planning.passes)."""

ENDS_S = 0.15
"""Of a run, at its ends: until the first micro-batch is computed, and from the last one's rows on the host to their commit."""


@dataclass(frozen=True)
class RatePlan:
    """Speeds of all chains together, in real tokens a second.

    Attributes:
        tokens_per_s: what is assumed: stated by the user, or estimated from the computation, in micro-batches of the prompts' sizes where they are
            known; None where neither is known.
        is_stated: whether the user stated it.
        is_measured: whether it comes of a profile that `m2ray bench` took.
        store_bytes_per_s: what the store must take at that rate; None where the rate is not known.
        limits: tokens a second that each resource allows, where it is known.
        limiting: the one that allows least, of the stages' own with the time to fill and drain the chains.
        filled_share: of the time in which a chain works, the share in which each stage does: S stages need M + S - 1 steps for M
            micro-batches; None without prompts.
        duration_s: of the given prompts at that least rate, with the time to fill and drain the chains and a run's ends unless the rate was
            stated; None without prompts or a rate.
        gpu_hours: what that comes to on all GPUs of the chains, loading not counted; None without a duration or GPUs.
        gpu_cost: of these hours at the stated price; None where none was stated.
    """

    tokens_per_s: float | None
    is_stated: bool
    is_measured: bool
    store_bytes_per_s: float | None
    limits: Mapping[Limit, float]
    limiting: Limit | None
    filled_share: float | None
    duration_s: float | None
    gpu_hours: float | None
    gpu_cost: float | None


def plan_rates(demand: Demand, placed: Sequence[DevicePlan], prompts: PromptStats | None, num_gpus: int) -> RatePlan:
    """What the layout and the assumptions, or a profile's measurements, allow.

    Args:
        demand: the model and what is asked of it.
        placed: every span of every chain.
        prompts: what the survey found, if there was one.
        num_gpus: of all chains, those without layers too: nobody else gets them.

    Raises:
        ConfigError: the profile is of another GPU or dtype.
    """
    options, assumed = demand.options, demand.assumed
    padding_waste = prompts.padding_waste if prompts else 0.0
    if assumed.profile:
        assumed.profile.require(options.compute_dtype, [each.device.gpu.name if each.device.gpu else None for each in placed])
    rows_a_token = prompts.rows_a_token if prompts else 1.0
    token_bytes = rows_a_token * sum(stored_row_bytes(part, options.compression) for part in options.parts)

    def computing(each: DevicePlan, tokens: int) -> float | None:
        return pass_s(demand, each, tokens, with_bringing=False, slowed=_slowed(demand, each, prompts))

    computed = assumed.tokens_per_s or _tokens_per_s(demand, placed, padding_waste, computing)
    found: dict[Limit, float | None] = {
        "computation": computed,
        "device_to_host_copy": _copied_tokens_per_s(demand, placed, rows_a_token),
        "offload": _brought_tokens_per_s(demand, placed, padding_waste),
        "encoder": _encoded_tokens_per_s(demand, placed, rows_a_token),
        "store": _stored_tokens_per_s(demand, token_bytes),
    }
    limits = {name: rate for name, rate in found.items() if rate is not None}
    filled_share = _filled_share(placed, prompts) if prompts else None
    # A stage that waits for its first micro-batch does nothing; the store meanwhile takes what the stages before it give.
    busy_share = 1.0 if assumed.tokens_per_s or filled_share is None else filled_share
    reached = {name: rate if name == "store" else rate * busy_share for name, rate in limits.items()}
    limiting = None if computed is None else _least(reached)
    ends_s = 0.0 if assumed.tokens_per_s else ENDS_S
    duration_s = None if prompts is None or limiting is None else prompts.tokens / reached[limiting] + ends_s
    gpu_hours = duration_s * num_gpus / 3600 if duration_s is not None and num_gpus else None
    return RatePlan(
        tokens_per_s=computed,
        is_stated=assumed.tokens_per_s is not None,
        is_measured=assumed.tokens_per_s is None and assumed.profile is not None,
        store_bytes_per_s=None if computed is None else computed * token_bytes,
        limits=limits,
        limiting=limiting,
        filled_share=filled_share,
        duration_s=duration_s,
        gpu_hours=gpu_hours,
        gpu_cost=None if gpu_hours is None or assumed.price_gpu_hour is None else gpu_hours * assumed.price_gpu_hour,
    )


def _slowed(demand: Demand, placed: DevicePlan, prompts: PromptStats | None) -> float:
    """How much longer a padded token takes a GPU in the prompts' micro-batches than in those that were measured: each has a fixed cost."""
    if placed.device.gpu is None or prompts is None or not prompts.micro_batches:
        return 1.0
    profile, mean_tokens = demand.assumed.profile, prompts.padded_tokens / prompts.micro_batches
    measured_tokens = profile.tokens_at(compiled=demand.options.compile) if profile else MEASURED_TOKENS
    return (1 + ON_GPU.fixed_tokens / mean_tokens) / (1 + ON_GPU.fixed_tokens / measured_tokens)


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


def _tokens_per_s(
    demand: Demand, placed: Sequence[DevicePlan], padding_waste: float, seconds: Callable[[DevicePlan, int], float | None]
) -> float | None:
    """Of all chains: each is as fast as its slowest stage, and a stage's devices work one after the other. None where a device's time is not known.

    `seconds` are what a device takes for so many tokens: those of a wave, or of a micro-batch.
    """
    of_stages: dict[tuple[int, int], float] = {}
    for each in placed:
        tokens = each.wave_tokens or demand.options.batch_tokens
        taken_s = seconds(each, tokens)
        if taken_s is None:
            return None
        stage = (each.replica, each.stage)
        of_stages[stage] = of_stages.get(stage, 0.0) + taken_s / tokens
    slowest: dict[int, float] = {}
    for (replica, _), stage_s in of_stages.items():
        slowest[replica] = max(slowest.get(replica, 0.0), stage_s)
    return sum((1 - padding_waste) / stage_s for stage_s in slowest.values() if stage_s) or None


def _brought_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], padding_waste: float) -> float | None:
    """By what is brought, computing beside it where that is known; None where nothing is, and where nothing waits for it."""
    if not any(bringing_s(demand, each) for each in placed):
        return None

    def seconds(each: DevicePlan, tokens: int) -> float:
        return pass_s(demand, each, tokens) or bringing_s(demand, each)

    rate, computed = (
        _tokens_per_s(demand, placed, padding_waste, of)
        for of in (seconds, lambda each, tokens: pass_s(demand, each, tokens, with_bringing=False))
    )
    return rate if rate is None or computed is None or rate < computed else None


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


def _encoded_tokens_per_s(demand: Demand, placed: Sequence[DevicePlan], rows_a_token: float) -> float | None:
    """Of all chains, by the stage that encodes most; None without a profile or rows. Each of its threads is at a part, of one shard or another."""
    profile = demand.assumed.profile
    if profile is None or not rows_a_token:
        return None
    parts: dict[tuple[int, int], list[int]] = {}
    for each in placed:
        parts.setdefault((each.replica, each.stage), []).extend(demand.row_bytes(each.held))
    slowest: dict[int, float] = {}
    for (replica, _), row_sizes in parts.items():
        if row_sizes:
            bytes_per_s = profile.writer_threads * profile.encoder_bytes_per_s(with_crcs=demand.options.with_crcs)
            rate = bytes_per_s / (rows_a_token * sum(row_sizes))
            slowest[replica] = min(slowest.get(replica, rate), rate)
    return sum(slowest.values()) or None


def _stored_tokens_per_s(demand: Demand, token_bytes: float) -> float | None:
    """By what the store is said to take, or what it took from the one machine of the profile."""
    assumed = demand.assumed
    rate = assumed.store_bytes_per_s or (assumed.profile.store_bytes_per_s if assumed.profile else None)
    return None if rate is None or not token_bytes else rate / token_bytes
