"""Which of the layers that find no room on the GPUs stay in host memory, and which on a disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m2ray.batches import LayerSpan
from m2ray.planning.demand import Demand
from m2ray.planning.hardware import Node
from m2ray.planning.rates import PlacedSpan

HOST_SHARE = 0.9
"""Of a node's free memory, what layers may fill before the rest goes to its disk: others live there too."""


@dataclass(frozen=True)
class Spill:
    """The layers of one GPU's span that are not kept on it, a run at the span's end: first those in host memory, then those on disk."""

    in_host: LayerSpan | None = None
    on_disk: LayerSpan | None = None

    @property
    def layers(self) -> LayerSpan | None:
        """All of them."""
        if self.in_host is None or self.on_disk is None:
            return self.in_host or self.on_disk
        return LayerSpan(self.in_host.start, self.on_disk.stop)


Spills = Mapping[tuple[int, int], Spill]
"""By replica and place in the chain; spans that find room whole are not named."""


def spill(demand: Demand, placed: Sequence[PlacedSpan]) -> Spills:
    """What each span leaves out of its GPU, all of it in host memory."""
    found = {(each.replica, each.place): demand.offloaded(each.span, each.device) for each in placed}
    return {key: Spill(in_host=layers) for key, layers in found.items() if layers}


def to_disk(demand: Demand, spills: Spills, node: Node, taken_bytes: int) -> Spills:
    """The spills of one node, with what its memory has no room for on its disk.

    A layer at a time gets its place in host memory, the next one of the GPU that has most on the disk, so that all of a chain wait
    about alike.

    Args:
        spills: those of the node.
        taken_bytes: what the node's stages need of its memory besides these layers.
    """
    has_bytes = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
    if demand.options.offload != "disk" or has_bytes is None:
        return spills
    room_bytes = int(has_bytes * HOST_SHARE) - taken_bytes
    layer_bytes = demand.table.layer_bytes(demand.itemsize_bytes)
    spans = {key: spilt.layers for key, spilt in spills.items() if spilt.layers}
    begins = {key: layers.start for key, layers in spans.items()}  # of what is on the disk
    while begins:
        key = max(begins, key=lambda key: spans[key].stop - begins[key])
        if begins[key] == spans[key].stop or layer_bytes[begins[key]] > room_bytes:
            break
        room_bytes -= layer_bytes[begins[key]]
        begins[key] += 1
    return {key: _cut(layers, begins[key]) for key, layers in spans.items()}


def _cut(layers: LayerSpan, begin: int) -> Spill:
    """Layers before `begin` in host memory, the others on the disk."""
    return Spill(
        LayerSpan(layers.start, begin) if begin > layers.start else None, LayerSpan(begin, layers.stop) if begin < layers.stop else None
    )
