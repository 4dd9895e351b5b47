"""Codes of four bits, two a byte, the first in the low bits: two or four values are looked up at once, and weights are made a core's cache at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch

from m2ray.model.quantization.scratch import scratch_tensor
from m2ray.model.quantization.stored import Unpack, settled

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""FP4's values, by code (OCP Microscaling Formats 1.0, section 5.3.3)."""

ALL = 1 << 31
"""More than an axis has: a block of all of it."""

CPU_VALUES, GPU_VALUES = 1 << 20, 1 << 24
"""Of a weight that are made at one time on a CPU and on a GPU, where what is made on the way takes some 16 bytes of memory a value."""

_PAIR_OF = {2: torch.int32, 4: torch.int64}
"""An integer as long as two values, by bytes a value."""


class Codes(Enum):
    """What codes stand for."""

    E2M1 = "FP4"
    E2M1_WITHOUT_NEGATIVE_ZERO = "FP4, -0.0 as 0.0"
    UNSIGNED = "0 to 15"
    LESS_8 = "-8 to 7"

    @property
    def numbers(self) -> tuple[float, ...]:
        """Of the 16 codes."""
        if self in (Codes.UNSIGNED, Codes.LESS_8):
            return tuple(float(code - 8 * (self is Codes.LESS_8)) for code in range(16))
        return E2M1 if self is Codes.E2M1 else tuple(number + 0.0 for number in E2M1)


Check = Callable[[Mapping[str, torch.Tensor]], None]
"""Raises CheckpointError where parts, on any device, contradict the configuration."""

OnCpu = Callable[[Mapping[str, torch.Tensor], torch.Tensor], bool]
"""Writes what the parts are into bfloat16 of any strides on a CPU, as `by_torch` has it but faster; or says that it cannot."""


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
        check: `by_torch` and `on_cpu` call it themselves.
        on_cpu: where there is a faster way on a CPU.
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
    on_cpu: OnCpu | None = None

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.by_torch(parts)


def look_up(codes: torch.Tensor, meaning: Codes, dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, [..., 2 * bytes of the last axis].

    Args:
        codes: contiguous along its last axis, of any dtype.
        dtype: bfloat16, float16 or float32; as float16 does, it must hold each value exactly.
    """
    data = as_bytes(codes)
    flat = data.reshape(-1)
    if flat.is_cuda or flat.numel() % 2 or flat.storage_offset() % 2:
        pairs = torch.index_select(_pairs(meaning, dtype, flat.device), 0, flat.int())
        return pairs.view(*data.shape).view(dtype)
    # On a CPU by two bytes: half as many look-ups, of four values that have 16 bits each.
    short = torch.float16 if dtype == torch.float32 else dtype
    fours = torch.index_select(_fours(meaning, short), 0, flat.view(torch.uint16).int())
    return fours.view(short).view(*data.shape[:-1], -1).to(dtype)


def look_up_into(words: torch.Tensor, meaning: Codes, into: torch.Tensor) -> None:
    """`look_up` on a CPU of int32 [rows, words] into bfloat16 or float16 [rows, 8 * words], both contiguous."""
    fours = scratch_tensor("fours", torch.int32, 2 * words.numel()).copy_(words.view(-1).view(torch.uint16))
    torch.index_select(_fours(meaning, into.dtype), 0, fours, out=into.view(-1).view(torch.int64))


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
    values = CPU_VALUES if device.type == "cpu" else GPU_VALUES
    step = max(1, values // max(columns * multiple, 1)) * multiple
    if step >= rows:
        return rows_of(0, rows).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=device)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        out[first:stop].copy_(rows_of(first, stop))
    return out


@cache
def _pairs(meaning: Codes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256], the bits of a byte's two values as one integer."""
    one = torch.tensor(meaning.numbers, dtype=dtype)
    both = torch.stack((one.repeat(16), one.repeat_interleave(16)), dim=-1)
    return settled(both.view(_PAIR_OF[dtype.itemsize]).reshape(-1).to(device))


@cache
def _fours(meaning: Codes, dtype: torch.dtype) -> torch.Tensor:
    """[65536], the bits of two bytes' four values of 16 bits as one integer."""
    pairs = _pairs(meaning, dtype, torch.device("cpu"))
    return torch.stack((pairs.repeat(256), pairs.repeat_interleave(256)), dim=-1).view(torch.int64).reshape(-1)
