"""Rows as they lie in memory as NumPy's floats: for those who read a run without torch. The same values as m2ray/activations/reading/values.py."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m2ray.batches import Bits, Column
from m2ray.sites import BLOCK_CHANNELS

Float32Array = npt.NDArray[np.float32]


def floats_of(columns: Sequence[Column], rows_NB: Bits) -> Float32Array:
    """The activations of rows, uint8 [..., bytes of a row], as float32 [..., W]; bfloat16, float16 and 8 bits become float32 without loss."""
    first = columns[0]
    values_NW = _as_float32(first, rows_NB[..., : first.row_bytes])
    if len(columns) == 1:
        return values_NW
    scale_NK = _as_float32(columns[1], rows_NB[..., first.row_bytes : first.row_bytes + columns[1].row_bytes])
    return values_NW * np.repeat(scale_NK, BLOCK_CHANNELS, axis=-1)[..., : first.width]


def _as_float32(column: Column, rows_NB: Bits) -> Float32Array:
    rows_NB = np.ascontiguousarray(rows_NB)
    if column.dtype == "bfloat16":  # the upper half of a float32
        return (rows_NB.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if column.dtype == "float8_e4m3fn":
        return np.take(_FLOAT8, rows_NB)
    numbers: Float32Array = rows_NB.view(column.dtype).astype(np.float32)
    return numbers


def _float8_values() -> Float32Array:
    """What each byte of float8_e4m3fn means: sign, 4 bits of exponent, 3 of fraction; no infinities, and one NaN of each sign."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    sizes = np.where(exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7))
    sizes[(byte & 127) == 127] = np.nan
    values: Float32Array = np.where(byte >> 7, -sizes, sizes).astype(np.float32)
    return values


_FLOAT8 = _float8_values()
