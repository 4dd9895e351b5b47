"""One tensor of a model as its checkpoint holds it: as it is, or packed into several tensors, which a method unpacks."""

from collections.abc import Callable, Mapping
from math import lcm
from typing import NamedTuple, Protocol

import torch

from m2ray.errors import CheckpointError
from m2ray.model.headers import TensorHeader

Shape = tuple[int, ...]

MISMATCH = "config.json and the weights do not belong together: take both from the same release."

Unpack = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Of some rows' parts, by name, as they lie in the file, on any device: those rows, in bfloat16."""


class Part(NamedTuple):
    """One of the checkpoint's tensors that a tensor is packed into.

    Attributes:
        name: what the method calls it.
        rows: unpacked rows that one of its own rows is about, along the first axis of both; 0 where all of it goes with every row.
    """

    name: str
    key: str
    header: TensorHeader
    rows: int = 1

    def bytes_of(self, first: int, stop: int) -> tuple[int, int]:
        """(begin within it, number) of its bytes that unpacked rows [first, stop) need."""
        if not self.rows:
            return 0, self.header.num_bytes
        row_bytes = self.header.num_bytes // max(self.header.shape[0], 1)
        begin = first // self.rows
        return begin * row_bytes, (-(-stop // self.rows) - begin) * row_bytes


class StoredTensor(NamedTuple):
    """A tensor under the name and with the shape that it has in the family's own files, where it is not quantised.

    Attributes:
        parts: what it is read from; the first holds the values. A tensor that is not packed has itself.
        unpack: makes it of them; None where nothing is packed.
        swapped: two axes of it that are swapped in what `unpack` gives, whose rows are then the last axis's.
        problems: why it cannot be read.
        method: the method's name, as a person is told it; "" where nothing is packed.
    """

    key: str
    shape: Shape
    parts: tuple[Part, ...]
    unpack: Unpack | None = None
    swapped: tuple[int, int] | None = None
    problems: tuple[CheckpointError, ...] = ()
    method: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """What its values are of; bfloat16 once unpacked."""
        return self.parts[0].header.dtype if self.unpack is None else torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Of all its parts, in the files."""
        return sum(part.header.num_bytes for part in self.parts)

    @property
    def num_rows(self) -> int:
        """Of what `unpack` gives."""
        axis = self.swapped[1] if self.swapped and self.swapped[0] == 0 else 0
        return self.shape[axis] if self.shape else 1

    @property
    def step_rows(self) -> int:
        """Between multiples of so many unpacked rows all parts can be cut; 0 where the tensor can only be read as a whole."""
        return lcm(*(part.rows for part in self.parts if part.rows)) if self.parts[0].rows else 0

    def bytes_of(self, first: int, stop: int) -> int:
        """Bytes of unpacked rows [first, stop). What goes with every row counts to the first."""
        return sum(part.bytes_of(first, stop)[1] for part in self.parts if part.rows or first == 0)


class Method(Protocol):
    """A way in which one tensor is packed into several."""

    @property
    def name(self) -> str:
        """As a person is told it: "FP8 in blocks of 128 x 128"."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """The endings (`part_key`) under which each part is published; the first part holds the values."""

    def takes(self, values: TensorHeader) -> bool:
        """Whether values of this dtype and shape are packed so."""

    def store(self, key: str, found: Mapping[str, tuple[str, TensorHeader]]) -> StoredTensor:
        """The tensor `key` of those of its parts that are there: by part, its own key and header. What is wrong stands in its `problems`."""

    def published_bytes(self, shape: Shape) -> int:
        """Bytes of all parts of a tensor of this shape, where no files are at hand."""


def part_key(key: str, ending: str) -> str:
    """The key of a tensor's part: the ending behind the tensor's own, or, if it begins with a dot, in the place of `.weight`."""
    return key.removesuffix(".weight") + ending if ending.startswith(".") else key + ending


def whole_key(part: str, ending: str) -> str:
    """The key of which `part` is the `part_key`."""
    return part.removesuffix(ending) + (".weight" if ending.startswith(".") else "")


def settled(table: torch.Tensor) -> torch.Tensor:
    """A table that is made once and then read on every stream: it is on its GPU when this returns."""
    if table.is_cuda:
        torch.cuda.current_stream(table.device).synchronize()
    return table
