"""8-bit values that share one scale, on a CPU: what the definition makes of each code is looked up, two at a time."""

from collections.abc import Callable

import torch

from m2ray.model.quantization.scratch import scratch_tensor

_VALUES_AT_ONCE = 1 << 20
"""As many as m2ray.model.quantization.codes_on_cpu makes of codes of four bits."""

_TABLE_VALUES = 1 << 22
"""From as many values on a table of 65,536 pairs is made for them alone."""


def can_look_up(values: torch.Tensor) -> bool:
    """Whether 8-bit values [rows, columns] are looked up, and faster than they are computed."""
    is_even = values.shape[1] % 2 == 0 and values.storage_offset() % 2 == 0
    return not values.is_cuda and values.numel() >= _TABLE_VALUES and values.is_contiguous() and is_even


def look_up_bytes(values: torch.Tensor, by_definition: Callable[[torch.Tensor], torch.Tensor], into: torch.Tensor) -> None:
    """Write what the definition makes of 8-bit values [rows, columns] into bfloat16 of any strides."""
    num_rows, columns = values.shape
    table = _pairs(by_definition(torch.arange(256, dtype=torch.uint8).view(values.dtype)))
    step = min(max(1, _VALUES_AT_ONCE // columns), num_rows)
    numbers = scratch_tensor("numbers", torch.int32, step * columns // 2)
    made = scratch_tensor("made", torch.int32, step, columns // 2)
    for codes, rows in zip(values.view(torch.uint16).split(step), into.split(step), strict=True):
        index = numbers[: codes.numel()].copy_(codes.view(-1))
        is_plain = rows.is_contiguous() and rows.storage_offset() % 2 == 0
        where = rows.view(torch.int32) if is_plain else made[: len(codes)]
        torch.index_select(table, 0, index, out=where.view(-1))
        if not is_plain:
            rows.copy_(where.view(torch.bfloat16))


def _pairs(values: torch.Tensor) -> torch.Tensor:
    """int32 [65536]: by the second code * 256 + the first, their two bfloat16."""
    return torch.stack((values.repeat(256), values.repeat_interleave(256)), dim=-1).view(torch.int32).reshape(-1)
