"""Codes of four bits, two a byte, the first in the low bits: a byte's two values are looked up at once, and weights are made a core's cache at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch

from m2ray.model.quantization.stored import Unpack, settled

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""FP4's values, by code (OCP Microscaling Formats 1.0, section 5.3.3)."""

ALL = 1 << 31
"""More than an axis has: a block of all of it."""

CACHED_VALUES, GPU_VALUES = 1 << 17, 1 << 24
"""Of a weight that are made at one time on a CPU and on a GPU, where what is made on the way takes some 10 bytes of memory a value."""

_PAIR_OF = {2: torch.int32, 4: torch.int64}
"""An integer as long as two values, by bytes a value."""


class Codes(Enum):
    """What codes stand for."""

    E2M1 = "FP4"
    E2M1_WITHOUT_NEGATIVE_ZERO = "FP4, -0.0 as 0.0"
    UNSIGNED = "0 to 15"
    LESS_8 = "-8 to 7"


Check = Callable[[Mapping[str, torch.Tensor]], None]
"""Raises CheckpointError where parts, on any device, contradict the configuration."""


@dataclass(frozen=True)
class NibbleUnpack:
    """Unpacks matrices of 4-bit codes, by torch, and says how a fused kernel does the same: (value - zero point) * scale of its block.

    Attributes:
        by_torch: makes [rows, columns] of the parts "values" and "scale", and those of "zero_point", "group", "tensor_scale" that the method has.
        block: rows and columns that share a scale, and a zero point.
        word_rows: rows that share a word of eight codes; 1 where words go along a row.
        is_interleaved: whether words, of zero points too, have AWQ's order.
        zero_word_rows: `word_rows` of zero points.
        zero_more: what is added to each word of zero points.
        has_group_index: whether part "group" has each row's block.
        is_divided: whether scales are divided by "tensor_scale".
        check: `by_torch` calls it itself.
    """

    by_torch: Unpack
    codes: Codes
    block: tuple[int, int]
    word_rows: int = 1
    is_interleaved: bool = False
    zero_word_rows: int = 1
    zero_more: int = 0
    has_group_index: bool = False
    is_divided: bool = False
    check: Check | None = None

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.by_torch(parts)


def look_up(codes: torch.Tensor, values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, [..., 2 * bytes of the last axis].

    Args:
        codes: contiguous along its last axis, of any dtype.
        values: of the 16 codes.
        dtype: bfloat16, float16 or float32, which must hold each value exactly.
    """
    data = as_bytes(codes)
    of_bytes = _pairs(tuple(map(float.hex, values)), dtype, codes.device)  # as text, for a cache takes -0.0 for 0.0
    pairs = torch.index_select(of_bytes, 0, data.reshape(-1).int())
    return pairs.view(data.shape).view(dtype)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., bytes of the last axis]."""
    return codes.reshape(-1).view(torch.uint8).view(*codes.shape[:-1], -1)  # one row's columns are contiguous at any stride


def in_cache(
    rows_of: Callable[[int, int], torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device, multiple: int = 1
) -> torch.Tensor:
    """[rows, columns]: what `rows_of(first, stop)` gives, for so many rows at a time that what it makes on the way stays in a core's cache, or small.

    For what loading cannot cut: experts stacked in one tensor, groups in an order of their own.

    Args:
        multiple: `first` is one of this.
    """
    rows, columns = shape
    values = CACHED_VALUES if device.type == "cpu" else GPU_VALUES
    step = max(1, values // max(columns * multiple, 1)) * multiple
    if step >= rows:
        return rows_of(0, rows).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=device)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        out[first:stop].copy_(rows_of(first, stop))
    return out


@cache
def _pairs(values: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256], the bits of a byte's two values as one integer."""
    one = torch.tensor([float.fromhex(value) for value in values], dtype=dtype)
    both = torch.stack((one.repeat(16), one.repeat_interleave(16)), dim=-1)
    return settled(both.view(_PAIR_OF[dtype.itemsize]).reshape(-1).to(device))
