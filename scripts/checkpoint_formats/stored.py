"""A weight as published and the tensors that a format stores for it, with what fills them: random codes are weights under any scales."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
ITEMSIZE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}

Drawer = Callable[[int], NDArray[np.uint8]]
"""Successive random bytes, as many a call as asked for (multiples of 8 but for the last)."""

Fill = Callable[[Drawer, float], Iterator[bytes]]
"""A tensor's bytes, in chunks, of random ones and of the standard deviation that the weight shall have."""


@dataclass(frozen=True)
class Piece:
    """A weight as published. A matrix is [out_features, in_features]."""

    name: str
    shape: tuple[int, ...]

    def number(self, of: Literal["layers", "experts"]) -> int | None:
        found = re.search(rf"\.{of}\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @property
    def in_blocks(self) -> bool:
        """Whether FP8 checkpoints quantise it: a decoder layer's matrix, unless a router's gate."""
        is_matrix = len(self.shape) == 2 and self.name.endswith(".weight")
        return is_matrix and self.number("layers") is not None and not re.search(r"\.(gate|router)\.", self.name)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(-(-side // BLOCK) for side in self.shape)


@dataclass(frozen=True)
class StoredTensor(Piece):
    """A tensor on disk.

    Attributes:
        pieces: whose values it holds, one after the other. Several in the fused layout, one elsewhere.
        fill: its bytes, where a format packs the piece; None for its values as they are.
    """

    dtype: str
    pieces: tuple[Piece, ...]
    fill: Fill | None = None

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE_BYTES[self.dtype]
