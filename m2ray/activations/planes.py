"""Planes: 16-bit rows as a plane of high bytes, which compress well, and one of low bytes, which do not. Nothing is lost.

The high byte of a bfloat16 is its sign and the upper seven bits of its exponent, which differ little between neighbours.
"""

import numpy as np

from m2ray.batches import Bits


def high(rows: Bits) -> Bits:
    """The high bytes, uint8 [N, W], of rows uint8 [N, W * 2]."""
    return (np.ascontiguousarray(rows).view("<u2") >> 8).astype(np.uint8)


def low(rows: Bits) -> Bits:
    """The low bytes, uint8 [N, W], of rows uint8 [N, W * 2]."""
    return np.ascontiguousarray(rows).view("<u2").astype(np.uint8)


def join(high: Bits, low: Bits, out: Bits) -> Bits:
    """The rows, uint8 [N, W * 2], whose bytes these are; they are put into `out`."""
    numbers = out.view("<u2")
    numbers[...] = high
    numbers <<= 8
    numbers |= low
    return out
