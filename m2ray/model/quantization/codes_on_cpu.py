"""4-bit codes unpacked on a CPU a core's cache at a time, into memory that is there already. What a method defines in plain torch stays the definition.

Where a scale is a byte (FP4), it and a byte of codes are one number of 16 bits, by which the definition's own two values are looked up. Whole
numbers are looked up four at a time and then multiplied by their groups' scales in one pass.
"""

from collections.abc import Mapping
from functools import cache
from math import inf

import numpy as np
import torch

from m2ray.model.quantization.groups import GroupScales, is_exact
from m2ray.model.quantization.nibbles import Codes, look_up_into
from m2ray.model.quantization.scratch import scratch_tensor
from m2ray.model.quantization.stored import Unpack

_VALUES_AT_ONCE = 1 << 20
"""That are made at one time: with their numbers they stay in a core's cache, and a thread asks for the interpreter's lock seldom enough."""

_TABLE_VALUES = 1 << 20
"""From as many values on a table of 131,072 is made for them alone."""


def write_by_pairs(parts: Mapping[str, torch.Tensor], by_torch: Unpack, group: int, into: torch.Tensor) -> bool:
    """Write matrices of FP4 codes with a scale of 8 bits for each `group` of a row, or say that they are too few for it.

    Args:
        parts: "values", two codes a byte along a row, "scale" and, if a tensor has one, "tensor_scale".
        into: bfloat16 [..., rows, columns] of any strides.
    """
    packed, scale = parts["values"].reshape(-1, into.shape[-1] // 2), parts["scale"].reshape(-1, into.shape[-1] // group)
    of_tensor = parts.get("tensor_scale")
    if of_tensor is not None and packed.numel() * 2 < _TABLE_VALUES:
        return False
    table = _table(by_torch, group, scale.dtype) if of_tensor is None else _pairs(by_torch, group, scale.dtype, of_tensor)
    rows = into.shape[-2]
    for number, matrix in enumerate(into.reshape(-1, *into.shape[-2:]) if into.dim() == 2 else into):
        span = slice(number * rows, (number + 1) * rows)
        _look_up_pairs(packed[span].view(torch.uint8), scale[span].view(torch.uint8), table, matrix)
    return True


@cache
def _table(by_torch: Unpack, group: int, scale: torch.dtype) -> torch.Tensor:
    return _pairs(by_torch, group, scale)


def _pairs(by_torch: Unpack, group: int, scale: torch.dtype, tensor_scale: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [65536]: by scale * 256 + codes, what the definition makes of a byte, two bfloat16."""
    scales, codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 512 // group), torch.arange(256, dtype=torch.uint8)
    parts = {"values": codes.repeat(256, 1), "scale": scales.view(scale)}
    return by_torch(parts if tensor_scale is None else {**parts, "tensor_scale": tensor_scale}).view(torch.int32).reshape(-1)


def _look_up_pairs(packed: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, into: torch.Tensor) -> None:
    """Packed is uint8 [rows, columns / 2], scale uint8 [rows, groups]."""
    num_rows, width = packed.shape
    groups = scale.shape[1]
    a_scale = width // groups  # bytes of codes
    step = min(max(1, _VALUES_AT_ONCE // (2 * width)), num_rows)
    high = np.repeat(np.arange(256, dtype=np.uint16) << 8, a_scale).view(f"V{2 * a_scale}")
    pairs = scratch_tensor("pairs", torch.int16, step * width)
    numbers, made = scratch_tensor("numbers", torch.int32, step * width), scratch_tensor("made", torch.int32, step * width)
    codes, scales, halves = packed.numpy().reshape(-1), scale.numpy().reshape(-1), pairs.view(torch.uint16)
    for first in range(0, num_rows, step):
        rows = into[first : first + step]
        begin, count = first * groups, len(rows) * groups
        some = halves[: count * a_scale]
        both = some.numpy()
        high.take(scales[begin : begin + count], out=both.view(high.dtype), mode="wrap")
        np.add(both, codes[begin * a_scale : (begin + count) * a_scale], out=both)
        index = numbers[: len(both)].copy_(some)
        is_plain = rows.is_contiguous() and rows.storage_offset() % 2 == 0
        where = rows.view(torch.int32).view(-1) if is_plain else made[: len(both)]
        torch.index_select(table, 0, index, out=where)
        if not is_plain:
            rows.copy_(where.view(torch.bfloat16).view(rows.shape))


def write_numbers(
    words: torch.Tensor, meaning: Codes, scale: torch.Tensor, zeros: torch.Tensor | None, size: int | None, into: torch.Tensor
) -> bool:
    """Write whole numbers of four bits, less zero points, times scales, rounded in the scales' dtype; or say that this is not how it is done.

    Args:
        words: int32 [rows, columns / 8], contiguous, the first code in the lowest bits.
        scale: bfloat16 or float16 [rows, groups], contiguous.
        zeros: float32 [rows, groups], contiguous; None where all are 0.
        size: columns of a group; None where a row is one.
        into: bfloat16 [rows, columns] of any strides.
    """
    num_rows, columns = into.shape
    size = size or columns
    if scale.dtype not in (torch.bfloat16, torch.float16) or columns != size * scale.shape[1] or columns % 8 or not into.numel():
        return False
    low, high = (float(number) for number in scale.float().aminmax())
    if not is_exact() or not -inf < low <= high < inf or (zeros is not None and low <= 0):  # not of a NaN
        return False
    step = min(max(8, _VALUES_AT_ONCE // columns // 8 * 8), num_rows)
    made, floats = scratch_tensor("made", scale.dtype, step, columns), scratch_tensor("floats", torch.float32, step, columns)
    scales = GroupScales(scale.view(-1), size, None if zeros is None else zeros.view(-1))
    for first in range(0, num_rows, step):
        rows = into[first : first + step]
        some = made[: len(rows)]
        look_up_into(words[first : first + step], meaning, some)
        where = rows if rows.is_contiguous() and scale.dtype == torch.bfloat16 else some
        scales.write(some, first * scale.shape[1], where)
        if where is some:  # float16 goes by float32: straight it takes four times as long
            rows.copy_(some if scale.dtype == torch.bfloat16 else floats[: len(rows)].copy_(some))
    return True
