"""One layer as its files have it: which of their bytes lie where in one run of memory, and what of them has to be unpacked.

Tensors that lie in the files as they are computed with have their place in the run as in memory, and are used there. The others lie in the
run as in the files, and are unpacked into a workspace that all layers share.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from m2ray.model.extents import EXTENT_BYTES, Range, RowsToLoad
from m2ray.model.skeleton import ModelTensor
from m2ray.model.tensors import MatchedTensor

ALIGNMENT = 256
"""Of tensors in a run and in the workspace, as CUDA's own allocations have it."""


class Read(NamedTuple):
    """Bytes [offset, stop) of a file, which lie from `at` on in the run, and the parts of tensors in them."""

    file: str
    offset: int
    stop: int
    at: int
    parts: tuple[Range, ...]

    def pieces(self, most_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, place in the run, bytes) of as many of its bytes at a time."""
        for offset in range(self.offset, self.stop, most_bytes):
            yield offset, self.at + offset - self.offset, min(most_bytes, self.stop - offset)


class PackedTensor(NamedTuple):
    """One of the layer's tensors. `at`: its place in the run, or in the workspace, if there are `pieces` that are unpacked there.

    The pieces' `into` are views of a tensor without memory.
    """

    tensor: ModelTensor
    at: int
    pieces: tuple[RowsToLoad, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor in memory, uint8, that is laid out like the run or the workspace."""
        return memory[self.at : self.at + _num_bytes(self.tensor)].view(self.tensor.dtype).view(self.tensor.shape)


@dataclass(frozen=True)
class PackedLayer:
    """A layer's run.

    Attributes:
        reads: what fills the run.
        places: where each part lies in it.
        num_bytes, workspace_bytes: of the run, and of what is unpacked.
    """

    tensors: tuple[PackedTensor, ...]
    reads: tuple[Read, ...]
    places: Mapping[Range, int]
    num_bytes: int
    workspace_bytes: int

    def in_run(self, run: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that are used where they lie, by name."""
        return {each.tensor.name: each.view(run) for each in self.tensors if not each.pieces}

    def in_workspace(self, workspace: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that are unpacked, by name."""
        return {each.tensor.name: each.view(workspace) for each in self.tensors if each.pieces}


def lay_out(layer: Iterable[tuple[MatchedTensor, Sequence[RowsToLoad]]]) -> PackedLayer:
    """Give all parts of a layer their places. `layer`: its tensors, and the pieces that fill each, as views of a tensor without memory."""
    tensors: list[PackedTensor] = []
    places: dict[Range, int] = {}
    packed: set[Range] = set()
    run_bytes = workspace_bytes = 0
    for matched, pieces in layer:
        tensor = matched.tensor
        if matched.lies_as == tensor.dtype:
            tensors.append(PackedTensor(tensor, run_bytes, ()))
            places |= {piece.values: run_bytes + int(piece.into.storage_offset()) * tensor.dtype.itemsize for piece in pieces}
            run_bytes = _aligned(run_bytes + _num_bytes(tensor))
        else:
            tensors.append(PackedTensor(tensor, workspace_bytes, tuple(pieces)))
            packed |= {part for piece in pieces for part in piece.parts.values()}
            workspace_bytes = _aligned(workspace_bytes + _num_bytes(tensor))
    places |= _in_file_order(packed, run_bytes)
    num_bytes = _aligned(max((place + part.num_bytes for part, place in places.items()), default=0))
    return PackedLayer(tuple(tensors), tuple(_joined(places)), places, max(num_bytes, run_bytes), workspace_bytes)


def _in_file_order(parts: Iterable[Range], stop: int) -> dict[Range, int]:
    """Places behind `stop`, where neighbours in a file stay neighbours and all keep their alignment."""
    places: dict[Range, int] = {}
    last: Range | None = None
    for part in sorted(parts, key=lambda part: part[:2]):
        gap = part.offset - last.stop if last is not None and last.file == part.file else -1
        at = stop + gap if 0 <= gap < ALIGNMENT else _aligned(stop) + part.offset % ALIGNMENT
        places[part] = at
        last, stop = part, at + part.num_bytes
    return places


def _joined(places: Mapping[Range, int]) -> Iterator[Read]:
    """As few reads as can be, of at most EXTENT_BYTES where no part is longer. No tensor begins in a gap of less than ALIGNMENT."""
    joined: list[Range] = []
    for part in sorted((part for part in places if part.num_bytes), key=lambda part: part[:2]):
        if joined:
            first, last = joined[0], joined[-1]
            gap = part.offset - last.stop if part.file == last.file else -1
            follows = 0 <= gap < ALIGNMENT and places[part] - places[last] == part.offset - last.offset
            if not follows or part.stop - first.offset > EXTENT_BYTES:
                yield _read(joined, places)
                joined = []
        joined.append(part)
    if joined:
        yield _read(joined, places)


def _read(parts: Sequence[Range], places: Mapping[Range, int]) -> Read:
    return Read(parts[0].file, parts[0].offset, parts[-1].stop, places[parts[0]], tuple(parts))


def _num_bytes(tensor: ModelTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
