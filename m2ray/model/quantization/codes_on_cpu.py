"""4-bit codes unpacked on a CPU a core's cache at a time, into memory that is there already. What a method defines in plain torch stays the definition.

Where a scale is a byte (FP4), it and a byte of codes are one number of 16 bits, by which the definition's own two values are looked up. Whole
numbers are looked up four at a time and then multiplied by their groups' scales in one pass.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch

from m2ray.model.quantization.groups import is_exact, scale_groups
from m2ray.model.quantization.nibbles import Codes, look_up_into
from m2ray.model.quantization.scratch import scratch_tensor
from m2ray.model.quantization.stored import Unpack

_VALUES_AT_ONCE = 1 << 20
"""That are made at one time: of 2^18, which stay in a core's cache, the threads' turns at the interpreter cost more than that saves."""

_TABLE_VALUES = 1 << 20
"""From as many values on a table of 131,072 is made for them alone."""

Words = Callable[[int, int], torch.Tensor]
"""Of rows [first, stop): int32 [rows, columns / 8], contiguous, the first code in the lowest bits."""


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
    a_scale = width // scale.shape[1]  # bytes of codes
    step = min(max(1, _VALUES_AT_ONCE // (2 * width)), num_rows)
    high = np.repeat(np.arange(256, dtype=np.uint16) << 8, a_scale).view(f"V{2 * a_scale}")
    pairs = scratch_tensor("pairs", torch.int16, step * width).numpy().view(np.uint16)
    numbers, made = scratch_tensor("numbers", torch.int32, step * width), scratch_tensor("made", torch.int32, step, width)
    for codes, scales, rows in zip(packed.split(step), scale.split(step), into.split(step), strict=True):
        some = pairs[: codes.numel()]
        high.take(scales.numpy().reshape(-1), out=some.view(high.dtype), mode="wrap")
        np.add(some, codes.numpy().reshape(-1), out=some)
        index = numbers[: codes.numel()].copy_(torch.from_numpy(some))
        is_plain = rows.is_contiguous() and rows.storage_offset() % 2 == 0
        where = rows.view(torch.int32) if is_plain else made[: len(codes)]
        torch.index_select(table, 0, index, out=where.view(-1))
        if not is_plain:
            rows.copy_(where.view(torch.bfloat16))


def rows_of(words: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """`Words` of words that lie so already."""
    return words[first:stop]


def write_numbers(
    words_of: Words, meaning: Codes, scale: torch.Tensor, zeros: torch.Tensor | None, size: int | None, into: torch.Tensor
) -> bool:
    """Write whole numbers of four bits, less zero points, times scales, rounded in the scales' dtype; or say that this is not how it is done.

    Args:
        scale: bfloat16 or float16 [rows, groups], contiguous.
        zeros: float32 [rows, groups], contiguous; None where all are 0.
        size: columns of a group; None where a row is one.
        into: bfloat16 [rows, columns] of any strides.
    """
    num_rows, columns = into.shape
    size = size or columns
    if scale.dtype not in (torch.bfloat16, torch.float16) or columns != size * scale.shape[1] or columns % 8 or not into.numel():
        return False
    if not is_exact() or not scale.isfinite().all() or (zeros is not None and scale.min() <= 0):
        return False
    step = min(max(8, _VALUES_AT_ONCE // columns // 8 * 8), num_rows)
    made, floats = scratch_tensor("made", scale.dtype, step, columns), scratch_tensor("floats", torch.float32, step, columns)
    factors = scale.float()
    for first in range(0, num_rows, step):
        stop = min(first + step, num_rows)
        some, rows = made[: stop - first], into[first:stop]
        look_up_into(words_of(first, stop), meaning, some)
        where = rows if rows.is_contiguous() and scale.dtype == torch.bfloat16 else some
        less = zeros[first:stop].view(-1) if zeros is not None else None
        scale_groups(some.view(-1, size), factors[first:stop].view(-1), where.view(-1, size), less)
        if where is some:  # float16 goes by float32: straight it takes four times as long
            rows.copy_(some if scale.dtype == torch.bfloat16 else floats[: stop - first].copy_(some))
    return True
