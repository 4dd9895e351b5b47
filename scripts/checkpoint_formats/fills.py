"""What the tensors of quantised formats are filled with. Each makes a fill (stored.py) of a module's function: other processes write shards."""

from collections.abc import Iterator
from functools import partial
from math import floor, log2

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.checkpoint_formats.stored import Drawer, Fill

CHUNK_BYTES = 2**20
E2M1_RMS, INT4_RMS, INT8_RMS, E4M3_RMS = 2.93, 4.64, 73.9, 127.0
"""Of all codes of a kind, whole numbers around their middle."""
E4M3_MIDDLE = 5.66
"""Of the scales of `e4m3_scales`."""
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def codes(num_bytes: int) -> Fill:
    """Any bytes: all are codes."""
    return partial(_codes, num_bytes)


def e4m3(count: int) -> Fill:
    """Any finite float8_e4m3fn."""
    return partial(_e4m3, count)


def nibbles(num_bytes: int, lowest: int, count: int) -> Fill:
    """Codes of four bits of which there are `count`, a power of two, from `lowest` on."""
    return partial(_nibbles, num_bytes, lowest, count)


def scales(count: int, dtype: str, rms: float) -> Fill:
    """Each up to a factor 2^(1/4) off the middle, so that none can stand for another unnoticed; `rms` is of the codes."""
    return partial(_scales, count, dtype, 1 / rms, 1)


def exponents(count: int, rms: float) -> Fill:
    """Powers of two as ue8m0 bytes, one of the two about the middle."""
    return partial(_exponents, count, rms)


def e4m3_scales(count: int) -> Fill:
    """float8_e4m3fn from 4 to 7.5."""
    return partial(_e4m3_scales, count)


def one(factor: float, power_of_std: int = 0, dtype: str = "F32") -> Fill:
    """One number: about `factor` times a power of the weight's standard deviation."""
    return partial(_scales, 1, dtype, factor, power_of_std)


def numbers(values: tuple[int, ...]) -> Fill:
    """These, as int64."""
    return partial(_numbers, values)


def groups_in_order(columns: int, group: int) -> Fill:
    """int32, each column's group."""
    return partial(_groups_in_order, columns, group)


def groups_in_random_order(columns: int, group: int) -> Fill:
    """int32, each column's group, as quantising in the order of activations leaves them."""
    return partial(_groups_in_random_order, columns, group)


def _codes(num_bytes: int, draw: Drawer, _std: float) -> Iterator[bytes]:
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield draw(min(CHUNK_BYTES, num_bytes - start)).tobytes()


def _e4m3(count: int, draw: Drawer, std: float) -> Iterator[bytes]:
    for chunk in _codes(count, draw, std):
        drawn = np.frombuffer(chunk, np.uint8)
        yield _bytes(drawn - ((drawn & 0x7F) == 0x7F))


def _nibbles(num_bytes: int, lowest: int, count: int, draw: Drawer, _std: float) -> Iterator[bytes]:
    drawn = draw(num_bytes)
    low, high = (lowest + (part & (count - 1)) for part in (drawn, drawn >> 4))
    yield _bytes(low | high << 4)


def _scales(count: int, dtype: str, factor: float, power_of_std: int, draw: Drawer, std: float) -> Iterator[bytes]:
    drawn = draw(8 * count).view("<u8") / 2.0**64
    values = factor * std**power_of_std * np.exp2((drawn - 0.5) / 2)
    yield torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()


def _exponents(count: int, rms: float, draw: Drawer, std: float) -> Iterator[bytes]:
    yield _bytes(127 + floor(log2(std / rms)) + (draw(count) & 1))


def _e4m3_scales(count: int, draw: Drawer, _std: float) -> Iterator[bytes]:
    yield _bytes(0x48 + (draw(count) & 7))


def _numbers(values: tuple[int, ...], _draw: Drawer, _std: float) -> Iterator[bytes]:
    yield np.array(values, "<i8").tobytes()


def _groups_in_order(columns: int, group: int, _draw: Drawer, _std: float) -> Iterator[bytes]:
    yield (np.arange(columns) // group).astype("<i4").tobytes()


def _groups_in_random_order(columns: int, group: int, draw: Drawer, _std: float) -> Iterator[bytes]:
    order = draw(8 * columns).view("<u8").argsort()
    yield (order // group).astype("<i4").tobytes()


def _bytes(values: NDArray[np.integer]) -> bytes:
    return values.astype(np.uint8).tobytes()
