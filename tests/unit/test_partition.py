"""The split of layers over devices, against every split there is."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2ray.batches import LayerSpan
from m2ray.errors import ClusterError, ConfigError
from m2ray.planning.partition import partition, short_by_bytes

M2_LAYER_BYTES = 7_339_011_072
M2_EMBEDDING_BYTES = 1_229_193_216
M2_NORM_BYTES = 6144


def every_split(costs: list[int], caps: list[int | None]) -> Iterator[list[int]]:
    """Bytes a device of each contiguous split within the caps, empty devices allowed."""
    for inner in combinations_with_replacement(range(len(costs) + 1), len(caps) - 1):
        loads = [sum(costs[a:b]) for a, b in pairwise([0, *inner, len(costs)])]
        if all(cap is None or load == 0 or load <= cap for load, cap in zip(loads, caps, strict=True)):
            yield loads


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, list[int | None]]:
    layers = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    ends = draw(st.tuples(st.integers(0, 9), st.integers(0, 3)))
    caps = draw(st.lists(st.none() | st.integers(-2, 40), min_size=1, max_size=min(len(layers), 5)))
    return layers, *ends, caps


@settings(max_examples=400)
@given(cases(), st.sampled_from(["auto", "balanced", "balanced_low_0", "sequential"]), st.integers(0, 1))
def test_every_map_against_brute_force(case, device_map, least_first):
    layers, first, last, caps = case
    costs = [*layers]
    costs[0] += first
    costs[-1] += last
    splits = list(every_split(costs, caps))
    if not splits:
        with pytest.raises(ClusterError, match=f"{short_by_bytes(layers, first, last, caps):,} of them"):
            partition(layers, first, last, caps, device_map)
        return

    spans = partition(layers, first, last, caps, device_map, least_first)

    assert [layer for span in spans.values() for layer in range(span.start, span.stop)] == list(range(len(layers)))
    loads = [sum(costs[spans[place].start : spans[place].stop]) if place in spans else 0 for place in range(len(caps))]
    assert loads in splits
    if device_map == "sequential":
        assert loads == max(splits)  # no split puts more on device 0; of those, none more on device 1; and so on
    elif device_map == "balanced_low_0" and len(caps) > 1:
        has_room = caps[0] is None or costs[0] <= caps[0]
        spared = min(split[0] for split in splits if split[0] or not (least_first and has_room))
        assert loads[0] == spared
        others = [split[1:] for split in splits if split[0] == spared]
        assert (max(loads[1:]), sum(load**2 for load in loads[1:])) == min((max(rest), sum(load**2 for load in rest)) for rest in others)
    else:
        assert (max(loads), sum(load**2 for load in loads)) == min((max(split), sum(load**2 for load in split)) for split in splits)


@settings(max_examples=200)
@given(cases(), st.integers(1, 40))
def test_equal_caps_leave_no_device_without_a_span(case, cap):
    layers, first, last, caps = case
    equal = [cap] * len(caps)
    if short_by_bytes(layers, first, last, equal):
        return
    assert len(partition(layers, first, last, equal)) == len(caps)


@settings(max_examples=200)
@given(cases())
def test_short_by_is_the_room_of_the_one_device_more_that_would_do(case):
    layers, first, last, caps = case
    short = short_by_bytes(layers, first, last, caps)
    if short:
        assert short_by_bytes(layers, first, last, [*caps, short]) == 0
        assert short_by_bytes(layers, first, last, [*caps, short - 1]) > 0


def test_seven_80_gb_devices_share_m2_evenly():
    # accelerate gives 8, 10, 10, 10, 10, 10 and 4 layers here.
    spans = partition([M2_LAYER_BYTES] * 62, M2_EMBEDDING_BYTES, M2_NORM_BYTES, [80 * 10**9] * 7)
    assert [len(span) for span in spans.values()] == [8, 9, 9, 9, 9, 9, 9]


def test_sequential_refuses_where_accelerate_spills_to_the_cpu():
    with pytest.raises(ClusterError, match="no room for the last"):
        partition([M2_LAYER_BYTES] * 62, M2_EMBEDDING_BYTES, M2_NORM_BYTES, [60 * 10**9, 60 * 10**9, 40 * 10**9], "sequential")


def test_balanced_low_0_leaves_the_first_device_alone_when_the_others_hold_the_model():
    spans = partition([10] * 6, 5, 1, [100, 40, 40], "balanced_low_0")
    assert {device: str(span) for device, span in spans.items()} == {1: "layers 0-2", 2: "layers 3-5"}


def test_a_device_too_small_for_any_layer_is_left_out():
    spans = partition([10] * 4, 0, 0, [None, 9, None])
    assert {device: len(span) for device, span in spans.items()} == {0: 2, 2: 2}


def test_one_device_takes_all_whatever_the_map():
    for device_map in ("auto", "balanced_low_0", "sequential"):
        assert partition([3, 4], 1, 1, [None], device_map) == {0: LayerSpan(0, 2)}


def test_more_devices_than_layers_are_refused_where_layers_are_balanced():
    with pytest.raises(ConfigError, match="3 devices cannot share 2 layers"):
        partition([1, 1], 0, 0, [None] * 3)
    with pytest.raises(ConfigError, match="3 devices cannot share 2 layers"):
        partition([1, 1], 0, 0, [None] * 4, "balanced_low_0")
    assert len(partition([1, 1], 0, 0, [None] * 3, "sequential")) == 1
