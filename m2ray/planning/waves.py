"""How many tokens a stage takes through a layer that is not ready before the next one: what makes unpacking and bringing cheap enough."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from m2ray.batches import PromptStats
from m2ray.planning.demand import Demand
from m2ray.planning.devices import DevicePlan
from m2ray.planning.memory import MOST_BATCHES
from m2ray.planning.passes import computing_s, pass_s

MOST_WAVE_TOKENS = 1 << 20
"""A larger wave loses more work to a kill than it saves: of MiniMax-M2 it is 6.4 GB of hidden states."""

_NOT_KNOWN_TOKENS = 32_768
"""Where computing is not known, as on CPUs, which read and unpack a layer in the time that they take for some hundreds of tokens of it."""

_ENOUGH = 1.03
"""Of the least time: the smallest wave within it is taken."""


class Wave(NamedTuple):
    """A wave's padded tokens, 0 for a micro-batch at a time; and what forces it to be smaller than what would take least time, "" for nothing."""

    tokens: int
    forced_by: str = ""


def waves(demand: Demand, placed: Sequence[DevicePlan], prompts: PromptStats | None) -> Iterator[Wave]:
    """The wave to take, and then smaller ones, for where memory has no room for it; the last is none. None alone where all layers are ready."""
    if any(each.residency for each in placed):
        most_tokens = _NOT_KNOWN_TOKENS if any(computing_s(demand, each) is None for each in placed) else MOST_WAVE_TOKENS
        most_tokens = min(most_tokens, MOST_BATCHES * demand.options.batch_tokens)
        best, within = _best(demand, placed, prompts, most_tokens), _most_in_flight(demand, placed)
        forced_by = "in_flight" if within < best else ""
        tokens = best
        while tokens > within and tokens > demand.options.batch_tokens:
            tokens //= 2
        while tokens > demand.options.batch_tokens:
            yield Wave(tokens, forced_by)
            tokens, forced_by = tokens // 2, "memory"
        yield Wave(0, forced_by)
    else:
        yield Wave(0)


def _most_in_flight(demand: Demand, placed: Sequence[DevicePlan]) -> int:
    """Each stage has a wave, and one more is on its way between them."""
    num_stages = max(each.stage for each in placed) + 1
    return demand.options.in_flight_bytes // ((num_stages + 1) * demand.workload.token_bytes)


def _best(demand: Demand, placed: Sequence[DevicePlan], prompts: PromptStats | None, most_tokens: int) -> int:
    """The smallest number of micro-batches, doubled again and again, whose time is close to the least."""
    sizes = [demand.options.batch_tokens]
    while 2 * sizes[-1] <= most_tokens:
        sizes.append(2 * sizes[-1])
    times = [_time_s(demand, placed, prompts, size) for size in sizes]
    return next(size for size, time_s in zip(sizes, times, strict=True) if time_s <= _ENOUGH * min(times))


def _time_s(demand: Demand, placed: Sequence[DevicePlan], prompts: PromptStats | None, tokens: int) -> float:
    """Of all prompts in such waves, or of one token where none are known; where computing is not known, of bringing alone, so the more the better."""
    slowest_s = max(pass_s(demand, each, tokens) or 1.0 for each in placed)
    if prompts is None:
        return slowest_s / tokens
    num_waves = ceil(prompts.padded_tokens / demand.options.replicas / tokens)
    return slowest_s * (num_waves + max(each.stage for each in placed))
