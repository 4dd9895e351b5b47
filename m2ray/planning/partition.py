"""Which device holds which layers: contiguous spans over exact bytes and caps."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from m2ray.batches import LayerSpan
from m2ray.errors import ClusterError, ConfigError

DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How layers are dealt out. "cuda:0" is "sequential" over one device: a caller hands over that device alone."""


def partition(
    layer_bytes: Sequence[int],
    first_bytes: int,
    last_bytes: int,
    caps_bytes: Sequence[int | None],
    device_map: DeviceMap = "auto",
    least_first: int = 0,
) -> dict[int, LayerSpan]:
    """Deal the layers out over devices in order: contiguous, all of them, none twice, no device above its cap.

    `auto` and `balanced` make the fullest device as little full as the caps allow, and among the splits that do, take the
    evenest (least sum of squared bytes). Under equal caps every device gets a span; under unequal ones a device too small
    to take part is left out. `balanced_low_0` gives device 0 as few layers as the others' caps allow (`least_first`, if they
    hold the rest) and balances the others. `sequential` fills each device up to its cap before it begins the next.

    Args:
        layer_bytes: bytes of each decoder layer, all above 0.
        first_bytes: bytes that live with layer 0 (the embedding).
        last_bytes: bytes that live with the last layer (the final norm).
        caps_bytes: what each device has room for; None for no limit.
        device_map: the strategy.
        least_first: layers that `balanced_low_0` leaves device 0 at least, 0 or 1, if it has room for one.

    Returns:
        The layers of each device that holds some, by its place in `caps_bytes`, in order.

    Raises:
        ConfigError: there are more devices to balance over than layers.
        ClusterError: the devices cannot hold the model; says by how much.
    """
    costs = _with_ends(layer_bytes, first_bytes, last_bytes)
    balanced = len(caps_bytes) - (device_map == "balanced_low_0" and len(caps_bytes) > 1)
    if device_map != "sequential" and balanced > len(costs):
        raise ConfigError(
            f"device_map = {device_map!r}: {balanced} devices cannot share {len(costs)} layers.", f"Use at most {len(costs)} devices."
        )
    short_bytes = short_by_bytes(layer_bytes, first_bytes, last_bytes, caps_bytes)
    if short_bytes:
        raise ClusterError(
            f"The weights need {sum(costs):,} bytes, and {len(caps_bytes)} devices have no room for the last {short_bytes:,} of them.",
            "Use more devices, or such as have more room.",
        )
    if device_map == "sequential":
        cuts = _fill(costs, caps_bytes)
    elif device_map == "balanced_low_0" and len(caps_bytes) > 1:
        cuts = _spare_first(costs, caps_bytes, least_first if _fits(costs[:1], caps_bytes[:1]) else 0)
    else:
        cuts = _balance(costs, caps_bytes)
    starts = [0, *cuts[:-1]]
    spans = zip(starts, cuts, strict=True)
    return {device: LayerSpan(start, stop) for device, (start, stop) in enumerate(spans) if start < stop}


def short_by_bytes(layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, caps_bytes: Sequence[int | None]) -> int:
    """Bytes of the layers that find no room when every device is filled in order; 0 if the model fits.

    No contiguous split places more, so this decides for every device map. One more device with room for these bytes,
    put last, would hold the rest.
    """
    costs = _with_ends(layer_bytes, first_bytes, last_bytes)
    cuts = _fill(costs, caps_bytes)
    return sum(costs[cuts[-1] :]) if cuts else sum(costs)


def _with_ends(layer_bytes: Sequence[int], first_bytes: int, last_bytes: int) -> list[int]:
    """The embedding is part of layer 0 and the final norm of the last layer: what is left is one list of costs."""
    assert layer_bytes, "a model without layers"
    assert min(layer_bytes) > 0, "a layer without bytes"
    costs = list(layer_bytes)
    costs[0] += first_bytes
    costs[-1] += last_bytes
    return costs


def _fill(costs: Sequence[int], caps_bytes: Sequence[int | None]) -> list[int]:
    """Where each device's layers end if each takes all that it can; if the layers do not fit, the last end is below their number."""
    cuts, layer = [], 0
    for cap_bytes in caps_bytes:
        held_bytes = 0
        while layer < len(costs) and (cap_bytes is None or held_bytes + costs[layer] <= cap_bytes):
            held_bytes += costs[layer]
            layer += 1
        cuts.append(layer)
    return cuts


def _fits(costs: Sequence[int], caps_bytes: Sequence[int | None]) -> bool:
    return _fill(costs, caps_bytes)[-1] == len(costs)


def _balance(costs: Sequence[int], caps_bytes: Sequence[int | None]) -> list[int]:
    """The evenest split among those whose fullest device is least full. The caps must have room."""
    ends = list(accumulate(costs, initial=0))
    loads = sorted({stop - start for index, start in enumerate(ends) for stop in ends[index + 1 :]})
    # The fullest device of any split holds one of these loads, and a higher limit never takes room away.
    limit = loads[bisect_left(loads, True, key=lambda load: _fits(costs, _at_most(load, caps_bytes)))]
    return _evenest(ends, _at_most(limit, caps_bytes))


def _at_most(limit: int, caps_bytes: Sequence[int | None]) -> list[int]:
    """The caps, none above `limit`, none below 0: what is reserved on a device may be more than it has."""
    return [limit if cap_bytes is None else max(0, min(cap_bytes, limit)) for cap_bytes in caps_bytes]


def _evenest(ends: Sequence[int], limits: Sequence[int]) -> list[int]:
    """The cuts of least summed square within limits, by dynamic programming over (devices used, layers placed)."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for limit in limits:
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (squares, cuts) in best.items():
            for stop in range(start, len(ends)):
                load = ends[stop] - ends[start]
                if load > limit:
                    break
                candidate = (squares + load * load, (*cuts, stop))
                reached[stop] = min(candidate, reached.get(stop, candidate))
        best = reached
    return list(best[len(ends) - 1][1])


def _spare_first(costs: Sequence[int], caps_bytes: Sequence[int | None], least: int) -> list[int]:
    """As few layers as possible on device 0, the others balanced."""
    others = caps_bytes[1:]
    kept = next(kept for kept in range(least, len(costs) + 1) if _fits(costs[kept:], others))
    if kept == len(costs):
        return [kept] * len(caps_bytes)
    return [kept, *(kept + cut for cut in _balance(costs[kept:], others))]
