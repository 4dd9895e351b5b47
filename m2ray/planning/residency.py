"""Where each layer's weights live: in the fastest place that has room for them, and what they take in each.

A chain's layers lie on their devices in one of three ways, tried in this order as far as the options allow them: all of them ready; all packed as
on disk, unpacked one at a time just before they run; or as many as find room, and the rest brought in turn from host memory or from files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from m2ray.batches import LayerSpan, Residency
from m2ray.option_types import Weights
from m2ray.planning.demand import Demand
from m2ray.planning.devices import HOST_SHARE, Device, DevicePlan
from m2ray.planning.hardware import Node
from m2ray.planning.memory import LANDING_BUFFERS, READERS_BYTES, readers_on_cpu_bytes
from m2ray.planning.partition import DeviceMap, partition, short_by_bytes

Way = tuple[Residency, bool]
"""Where layers lie that are kept on a device ("gpu", or packed: "gpu_packed", without a GPU "host"), and whether others may be brought."""

Spans = dict[int, tuple[LayerSpan, Mapping[int, Residency]]]
"""By a chain's device: its layers, and where those live that are not ready on it."""


_KEPT: Mapping[Weights, Sequence[Residency]] = {"auto": ["gpu", "gpu_packed"], "bf16": ["gpu"], "packed": ["gpu_packed"]}
"""How layers may be kept on a GPU, from the fastest on; without one those that are packed lie in its host's memory."""


def held_bytes(demand: Demand, span: LayerSpan, residency: Mapping[int, Residency], device: Device) -> dict[str, int]:
    """What a span takes on its device, item by item: ready and packed weights, and what it takes to use those that are not ready.

    All layers but those ready are unpacked into one workspace; what is brought lands in one of two buffers. What lies in the files as it is
    computed is used where it is. A stage with such layers takes a wave of micro-batches through one of them before the next.
    """
    ready, packed = demand.layer_bytes, demand.packed_bytes
    outside = {layer: place for layer, place in residency.items() if place != "gpu"}
    in_place = [layer for layer, place in outside.items() if place == ("gpu_packed" if device.gpu else "host")]
    brought = [packed[layer] for layer in outside if layer not in in_place]
    found = {
        "weights": demand.span_bytes(span) - sum(ready[layer] for layer in outside),
        "packed_weights": sum(packed[layer] for layer in in_place),
        "workspace": max((demand.unpacked_bytes[layer] for layer in outside), default=0),
        "landing_buffers": min(LANDING_BUFFERS, len(brought)) * max(brought, default=0),
        "wave": demand.wave_bytes(span) if outside else 0,
        "readers": 0 if device.gpu else readers_on_cpu_bytes(device.node, max(brought, default=0)),
    }
    return {name: num_bytes for name, num_bytes in found.items() if num_bytes or name == "weights"}


def deal(demand: Demand, chain: Sequence[Device]) -> tuple[int, Spans]:
    """Bytes of weights for which one chain's devices have no room, 0 if there is; and the layers of each device that gets some.

    Where none of the ways has room it is the one that lacks least: on few layers bringing them takes more than it saves.
    """
    tried: list[tuple[int, Spans]] = []
    for way in _ways(demand, on_gpu=chain[0].gpu is not None):
        tried.append(_dealt(demand, chain, way))
        if not tried[-1][0]:
            break
    return min(tried, key=lambda dealt: dealt[0])


def _ways(demand: Demand, *, on_gpu: bool) -> list[Way]:
    """From the fastest on."""
    options = demand.options
    kept = _KEPT[options.weights] if demand.is_packed else _KEPT["bf16"]
    if not on_gpu:
        kept = ["host" if place == "gpu_packed" else place for place in kept]
    may_bring = options.offload != "none" if on_gpu else options.offload in ("disk", "auto")
    return [*((place, False) for place in kept), *([(kept[-1], True)] if may_bring else [])]


def _dealt(demand: Demand, chain: Sequence[Device], way: Way) -> tuple[int, Spans]:
    kept, may_bring = way
    options, on_gpu = demand.options, chain[0].gpu is not None
    device_map = "sequential" if options.device_map.startswith("cuda:") else cast("DeviceMap", options.device_map)
    # A GPU may stay free, but a number of stages that was asked for is one of stages with layers.
    least_first = int(options.stages is not None and (not on_gpu or options.gpus_per_stage == 1))
    layers, first, last = _costs(demand, kept)
    if not on_gpu:  # layers are dealt out by their time, and the embedding takes none
        spans = partition(layers, 0, 0, [None] * len(chain), device_map, least_first)
    elif may_bring:
        spans = partition(layers, first, last, [None] * len(chain), "balanced")
    else:
        everything = LayerSpan(0, len(layers))
        beside = held_bytes(demand, everything, _kept(demand, everything, kept, len(layers), 0), chain[0])
        beside_bytes = beside.get("workspace", 0) + beside.get("wave", 0)
        is_alone = len(chain) == 1 and demand.is_whole(everything)
        rooms_bytes = (demand.room_bytes(device, everything, {}, is_alone=is_alone) for device in chain)
        caps_bytes = [room and room - beside_bytes for room in rooms_bytes]
        short_bytes = short_by_bytes(layers, first, last, caps_bytes)
        if short_bytes:
            return short_bytes, {}
        spans = partition(layers, first, last, caps_bytes, device_map, least_first)
    found = {place: (span, _fitted(demand, span, chain[place], way)) for place, span in spans.items()}
    return sum(_too_much_bytes(demand, span, residency, chain[place]) for place, (span, residency) in found.items()), found


def _costs(demand: Demand, kept: Residency) -> tuple[Sequence[int], int, int]:
    """(bytes of each layer that is run, as it is kept; those that live with the first, with the last)."""
    ready, packed = demand.layer_bytes, demand.packed_bytes
    layers = [packed[layer] if kept != "gpu" and demand.is_quantised[layer] else ready[layer] for layer in range(demand.num_layers)]
    return layers, *demand.end_bytes


def _kept(demand: Demand, span: LayerSpan, kept: Residency, num_kept: int, num_ready: int) -> dict[int, Residency]:
    """The first `num_kept` layers on the device, of these the first `num_ready` ready, and the rest in host memory."""
    found: dict[int, Residency] = {}
    for number, layer in enumerate(range(span.start, span.stop)):
        place: Residency = "host" if number >= num_kept else kept if number >= num_ready and demand.is_quantised[layer] else "gpu"
        if place != "gpu":
            found[layer] = place
    return found


def _fitted(demand: Demand, span: LayerSpan, device: Device, way: Way) -> Mapping[int, Residency]:
    """As many layers kept on the device as find room, and of these as many ready as find room then, if packed is not what was asked for."""
    kept, may_bring = way
    on_gpu = device.gpu is not None

    def fits(num_kept: int, num_ready: int) -> bool:
        residency = _brought_on_cpu(_kept(demand, span, kept, num_kept, num_ready), num_kept, span, on_gpu=on_gpu)
        return not _too_much_bytes(demand, span, residency, device)

    most = len(span)
    num_kept = next((number for number in range(most, 0, -1) if fits(number, 0)), 0) if may_bring else most
    may_be_ready = kept != "gpu" and demand.options.weights == "auto"
    num_ready = next((number for number in range(num_kept, 0, -1) if fits(num_kept, number)), 0) if may_be_ready else 0
    return _brought_on_cpu(_kept(demand, span, kept, num_kept, num_ready), num_kept, span, on_gpu=on_gpu)


def _brought_on_cpu(residency: dict[int, Residency], num_kept: int, span: LayerSpan, *, on_gpu: bool) -> dict[int, Residency]:
    """Without a GPU the host is the device: what finds no room there is read from files."""
    if on_gpu:
        return residency
    return {layer: "checkpoint" if layer >= span.start + num_kept else place for layer, place in residency.items()}


def _too_much_bytes(demand: Demand, span: LayerSpan, residency: Mapping[int, Residency], device: Device) -> int:
    room_bytes = demand.room_bytes(device, span, residency, is_alone=demand.is_whole(span))
    if room_bytes is None:
        return 0
    return max(0, sum(held_bytes(demand, span, residency, device).values()) - room_bytes)


def with_files(demand: Demand, placed: Sequence[DevicePlan], node: Node, taken_bytes: int) -> tuple[DevicePlan, ...]:
    """The same with those layers of one node read from files that are not to be in its memory, or find no room there.

    A layer at a time gets its place in host memory, the next one of the GPU that has most in files (of equals the last), so that
    all of a chain wait about alike. One copy serves all the node's replicas.

    Args:
        placed: the devices of all chains, with all that finds no room on them in host memory.
        node: whose memory it is.
        taken_bytes: what the node's stages need of it besides these layers.
    """
    has_bytes = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
    offload = demand.options.offload
    if offload not in ("disk", "auto") or (offload == "auto" and has_bytes is None):
        return tuple(placed)
    room_bytes = 0 if offload == "disk" else int((has_bytes or 0) * HOST_SHARE) - taken_bytes
    waiting = {
        number: _in_memory(each) for number, each in enumerate(placed) if each.device.node.name == node.name and each.device.gpu is not None
    }
    in_memory: set[int] = set()
    while waiting:
        layers = max(reversed(waiting.values()), key=len)
        needs_bytes = demand.packed_bytes[layers[0]] if layers and layers[0] not in in_memory else 0
        if not layers or needs_bytes > room_bytes:
            break
        room_bytes -= needs_bytes
        in_memory.add(layers.pop(0))
    return tuple(
        replace(each, residency={**each.residency, **dict.fromkeys(waiting.get(number, ()), "checkpoint")})
        for number, each in enumerate(placed)
    )


def shared_layers(device: DevicePlan, placed: Sequence[DevicePlan]) -> frozenset[int]:
    """Those of a device's layers in host memory of which one copy serves other stages of its node too."""
    others = [
        set(_in_memory(each))
        for each in placed
        if each.device.node.name == device.device.node.name and (each.replica, each.stage) != (device.replica, device.stage)
    ]
    return frozenset(layer for layer in _in_memory(device) if any(layer in of_other for of_other in others))


def shared_bytes(demand: Demand, placed: Sequence[DevicePlan]) -> int:
    """Host memory that the stages of one node take less than each by itself would: of each packed layer it has one copy."""
    copies = Counter(layer for each in placed for layer in _in_memory(each))
    return sum((number - 1) * demand.packed_bytes[layer] for layer, number in copies.items())


def _in_memory(device: DevicePlan) -> list[int]:
    return [layer for layer, place in device.residency.items() if place == "host"]


def readers_bytes(placed: Sequence[DevicePlan]) -> int:
    """Host memory through which the layers of these devices are read from files."""
    return READERS_BYTES * sum("checkpoint" in each.residency.values() for each in placed if each.device.gpu)


def runs(span: LayerSpan, residency: Mapping[int, Residency]) -> Iterator[tuple[LayerSpan, Residency]]:
    """The span in runs of layers that live in the same place."""
    start = span.start
    for layer in range(span.start, span.stop):
        place = residency.get(layer, "gpu")
        if layer + 1 == span.stop or residency.get(layer + 1, "gpu") != place:
            yield LayerSpan(start, layer + 1), place
            start = layer + 1
