"""What the methods with several values a byte share: a weight's shape tells its parts' shapes, by which files are checked and plans counted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from m2ray.errors import CheckpointError
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.stored import Part, Shape, StoredTensor, Unpack, part_key

Found = Mapping[str, tuple[str, TensorHeader]]
"""Of a tensor's parts those that are there: by part, its own key and header."""


class Piece(NamedTuple):
    """What a part has to be.

    Attributes:
        shape: of the part; () for one number, which may have any number of axes of one.
        dtypes: the usual one first.
        rows: as in `Part`.
        is_needed: whether a weight without it cannot be read.
    """

    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    rows: int = 1
    is_needed: bool = True


class Packed(ABC):
    """A method whose parts follow from a weight's shape. `name`, `parts` and `takes` as in `Method`.

    Attributes:
        swapped: as in `StoredTensor`.
        multiples: what the last two sides of a weight [rows, columns] are multiples of: whole words, whole groups.
    """

    name: str
    parts: Mapping[str, tuple[str, ...]]
    swapped: tuple[int, int] | None = None
    multiples: tuple[int, int] = (1, 1)

    @abstractmethod
    def takes(self, values: TensorHeader) -> bool:
        """Whether values of this dtype and shape are packed so."""

    @abstractmethod
    def shape_of(self, found: Found) -> Shape:
        """The weight's shape in the model."""

    @abstractmethod
    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        """What the parts of a weight of that shape are."""

    @abstractmethod
    def unpacking(self) -> Unpack:
        """What makes a weight, or some of its rows, of the parts."""

    def store(self, key: str, found: Found) -> StoredTensor:
        """The tensor `key` of its parts, with what is wrong of them."""
        shape = self.shape_of(found)
        pieces = self.pieces(shape)
        problems = [problem for name, piece in pieces.items() for problem in self._problems(key, shape, name, piece, found)]
        if any(side % multiple for side, multiple in zip(shape[-2:], self.multiples, strict=True)):
            problems.append(CheckpointError(f"{key} {list(shape)} as {self.name} needs sides that {list(self.multiples)} divide."))
        parts = tuple(Part(name, *found[name], piece.rows) for name, piece in pieces.items() if name in found)
        return StoredTensor(key, shape, parts, self.unpacking(), self.swapped, tuple(problems), self.name)

    def published_bytes(self, shape: Shape) -> int:
        """Bytes of all parts that a weight of this shape needs."""
        return sum(prod(piece.shape) * piece.dtypes[0].itemsize for piece in self.pieces(shape).values() if piece.is_needed)

    def _problems(self, key: str, shape: Shape, name: str, piece: Piece, found: Found) -> list[CheckpointError]:
        if name not in found:
            lacking = part_key(key, self.parts[name][0])
            return [CheckpointError(f"{key} is packed as {self.name}, but {lacking} is missing.")] if piece.is_needed else []
        part, header = found[name]
        is_one = piece.shape == () and prod(header.shape) == 1
        if header.dtype in piece.dtypes and (is_one or header.shape == piece.shape):
            return []
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in piece.dtypes)
        return [
            CheckpointError(
                f"{part} is {str(header.dtype).removeprefix('torch.')} {list(header.shape)}; "
                f"{key} {list(shape)} as {self.name} needs {dtypes} {list(piece.shape)}."
            )
        ]
