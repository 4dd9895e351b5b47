"""float8_e4m3fn times its scales on a CPU by shifts: its bits are those of a bfloat16 that is 2^120 times smaller, but for NaN.

The products are the same, since a power of two rounds nothing. Numbers below 2^-6 are subnormal then, which a core multiplies a hundred times
slower: where there are many of them, as in no trained weight, m2ray.model.quantization.scaling goes by float16.
"""

import numpy as np
import torch

from m2ray.model.quantization.groups import GroupScales, in_bfloat16, is_exact
from m2ray.model.quantization.scratch import scratch_tensor

_ELEMENTS_AT_ONCE = 1 << 21
"""Many: the threads that load take turns at the interpreter between operations, which costs more than a cache saves. Of 2^20 two threads on two cores
had 0.30 to 0.35 of a copy where of these they have 0.34 to 0.40; of 2^18 less than half as much."""

_LONGEST_ROW = 1 << 20
_SMALLER = 2.0**120
_LARGE = 2.0**7
"""Of scales, from where on they may not be 2^120 times as large."""

_FOUR_BITS = np.int16(1 << 4)
_WITHOUT_COPIES = np.int16(~0x7800)
"""Of the sign, which is five times there."""

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
    groups, size = factors.shape[1], columns // factors.shape[1]
    by_row = factors.repeat_interleave(height, 0)[:num_rows] if height > 1 else factors
    scales = GroupScales(in_bfloat16(by_row * _SMALLER).view(-1), size)
    step = min(max(1, _ELEMENTS_AT_ONCE // columns), num_rows)
    bits, codes = scratch_tensor("bits", torch.int16, step, columns), values.view(torch.int8)
    for first in range(0, num_rows, step):
        of = slice(first, min(first + step, num_rows))
        rows = into[of]
        if _has_nan(codes[of].numpy()):
            rows.copy_((values[of].float().view(-1, groups, size) * by_row[of].unsqueeze(-1)).view(rows.shape))
            continue
        some = bits[: len(rows)]
        _shift(codes[of].numpy(), some.numpy())
        made = some.view(torch.bfloat16)
        where = rows if rows.is_contiguous() else made
        scales.write(made, first * groups, where)
        if where is made:
            rows.copy_(made)


def _shift(codes: np.ndarray, bits: np.ndarray) -> None:
    """By numpy, which begins in a fifth of the time that torch takes for it."""
    np.copyto(bits, codes)
    np.multiply(bits, _FOUR_BITS, out=bits)
    np.bitwise_and(bits, _WITHOUT_COPIES, out=bits)


def _has_nan(codes: np.ndarray) -> bool:
    return bool(codes.max() == 0x7F or codes.view(np.uint8).max() == 0xFF)
