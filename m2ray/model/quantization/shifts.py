"""float8_e4m3fn times its scales on a CPU by shifts: its bits are those of a bfloat16 that is 2^120 times smaller, but for NaN.

The products are the same, since a power of two rounds nothing. Numbers below 2^-6 are subnormal then, which a core multiplies a hundred times
slower: where there are many of them, as in no trained weight, m2ray.model.quantization.scaling goes by float16.
"""

import torch

from m2ray.model.quantization.groups import is_exact, scale_groups
from m2ray.model.quantization.scratch import scratch_tensor

_ELEMENTS_AT_ONCE = 1 << 21
"""Many: the threads that load take turns at the interpreter between torch's operations, which costs more than a cache saves. With 2^18 four threads on two
cores came to 1.9 GB/s where these come to 4.1."""

_LONGEST_ROW = 1 << 20
_SMALLER = 2.0**120
_LARGE = 2.0**7
"""Of scales, from where on they may not be 2^120 times as large."""

_SAMPLES, _MOST_SUBNORMAL = 256, 3


def can_write(values: torch.Tensor, factors: torch.Tensor, width: int) -> bool:
    """Whether values [rows, columns] times float32 factors, of `width` columns each, are written by `write`, and fast."""
    if values.dtype != torch.float8_e4m3fn or values.is_cuda or not values.numel() or values.shape[1] > _LONGEST_ROW:
        return False
    if (values.shape[1] % width and factors.shape[1] > 1) or not values.is_contiguous() or not is_exact():
        return False
    some = values.view(torch.uint8).view(-1)[:: max(1, values.numel() // _SAMPLES)] & 0x7F
    return bool(factors.abs().amax() < _LARGE) and int(((some > 0) & (some < 8)).sum()) <= _MOST_SUBNORMAL


def write(values: torch.Tensor, factors: torch.Tensor, height: int, into: torch.Tensor) -> None:
    """Write values [rows, columns] times factors, as bfloat16 of any strides.

    Args:
        factors: float32 [ceil(rows / height), blocks of a row].
    """
    num_rows, columns = values.shape
    by_row, size = factors.repeat_interleave(height, 0)[:num_rows], columns // factors.shape[1]
    step = min(max(1, _ELEMENTS_AT_ONCE // columns), num_rows)
    memory, codes = scratch_tensor("bits", torch.int16, step, columns), values.view(torch.int8)
    for some, scales, rows in zip(codes.split(step), by_row.split(step), into.split(step), strict=True):
        if _has_nan(some):
            rows.copy_((some.view(values.dtype).float().view(*scales.shape, size) * scales.unsqueeze(-1)).view(some.shape))
            continue
        bits = memory[: len(some)].copy_(some).mul_(1 << 4).bitwise_and_(~0x7800)  # the sign is five times there
        made = bits.view(torch.bfloat16)
        where = rows if rows.is_contiguous() else made
        scale_groups(made.view(-1, size), (scales * _SMALLER).view(-1), where.view(-1, size))
        if where is made:
            rows.copy_(made)


def _has_nan(codes: torch.Tensor) -> bool:
    return bool(codes.amax() == 0x7F or codes.view(torch.uint8).amax() == 0xFF)
