"""Where each layer's weights live that find no room on their GPU: in host memory, or on their node's disk."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from m2ray.batches import LayerSpan, Residency
from m2ray.planning.demand import Demand
from m2ray.planning.devices import DevicePlan
from m2ray.planning.hardware import Node

HOST_SHARE = 0.9
"""Of a node's free memory, what layers may fill before the rest goes to its disk: others live there too."""


def in_host(demand: Demand, placed: Sequence[DevicePlan]) -> tuple[DevicePlan, ...]:
    """Each device with the layers that it has no room for, a run at its span's end, in host memory."""
    return tuple(replace(each, residency=dict.fromkeys(demand.layers_outside(each.held, each.device), "host")) for each in placed)


def with_disk(demand: Demand, placed: Sequence[DevicePlan], node: Node, taken_bytes: int) -> tuple[DevicePlan, ...]:
    """The same with those layers of one node on its disk that its memory has no room for.

    A layer at a time gets its place in host memory, the next one of the GPU that has most on the disk (of equals the last), so that
    all of a chain wait about alike.

    Args:
        placed: the devices of all chains, as `in_host` gives them.
        node: whose disk it is.
        taken_bytes: what the node's stages need of its memory besides these layers.
    """
    has_bytes = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
    if demand.options.offload != "disk" or has_bytes is None:
        return tuple(placed)
    room_bytes = int(has_bytes * HOST_SHARE) - taken_bytes
    layer_bytes = demand.table.layer_bytes(demand.itemsize_bytes)
    waiting = {number: list(each.residency) for number, each in enumerate(placed) if each.device.node.name == node.name}
    while waiting:
        layers = max(reversed(waiting.values()), key=len)
        if not layers or layer_bytes[layers[0]] > room_bytes:
            break
        room_bytes -= layer_bytes[layers.pop(0)]
    return tuple(
        replace(each, residency={**each.residency, **dict.fromkeys(waiting.get(number, ()), "disk")}) for number, each in enumerate(placed)
    )


def layers_in(residency: Mapping[int, Residency], *places: Residency) -> LayerSpan | None:
    """The span of layers that live in one of these places; None for none."""
    layers = [layer for layer, place in residency.items() if place in places]
    return LayerSpan(min(layers), max(layers) + 1) if layers else None
