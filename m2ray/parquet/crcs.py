"""CRC32s as algebra, many at a time: a page's is put together from those of its values, as zlib's crc32_combine does with two.

Bytes are a polynomial over GF(2), and their CRC32 is what remains of it: what bytes that follow make of a CRC32 is linear in its bits. And a CRC32 is linear in
the message's own bits, but for the CRC32 of as many zeros, which all messages of that length have in common.
Source: https://github.com/madler/zlib/blob/master/crc32.c, crc32_combine and x2nmodp.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Crcs = npt.NDArray[np.uint32]

_POLYNOMIAL = np.uint32(0xEDB88320)
"""x^32 + x^26 + x^23 + ... + 1 of zlib, gzip and Parquet, the highest power in the lowest bit and left out."""

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


def crcs_of_pages(crcs: Crcs, value_bytes: int, page_values: int) -> Crcs:
    """The CRC32 of each page, uint32 [pages].

    Args:
        crcs: of each value, uint32 [N].
        value_bytes: bytes of a value.
        page_values: in every page but the last one.
    """
    whole, rest = divmod(len(crcs), page_values)
    of_pages = np.zeros((whole + (rest > 0), page_values), "<u4")
    of_pages[:whole] = crcs[: len(crcs) - rest].reshape(whole, page_values)
    of_pages[whole:, page_values - rest :] = crcs[len(crcs) - rest :]  # a CRC32 of 0 before a page's values is that of nothing
    places = of_pages.view(np.uint8) + np.arange(0, page_values * 1024, 256)
    found: Crcs = np.bitwise_xor.reduce(_moved(value_bytes, page_values)[places], axis=1)
    return found


def crcs_of_bits(num_bytes: int) -> Crcs:
    """What each bit of a message, the lowest of a byte first, changes in its CRC32: uint32 [num_bytes, 8]."""
    found = _after(1, _BITS[None, :8])
    while len(found) < num_bytes:
        found = np.concatenate([_after(len(found), found), found])
    return found[-num_bytes:]


@lru_cache(16)
def _moved(value_bytes: int, page_values: int) -> Crcs:
    """What becomes of each byte of each value's CRC32 by the values that follow it in a whole page: uint32 [page_values * 4 * 256]."""
    bits = _BITS[None, :]
    while len(bits) < page_values:
        bits = np.concatenate([_after(len(bits) * value_bytes, bits), bits])
    bits = bits[-page_values:].reshape(page_values, 4, 8)
    moved = np.zeros((page_values, 4, 1), np.uint32)
    for bit in range(8):
        moved = np.concatenate([moved, moved ^ bits[:, :, bit, None]], axis=2)
    return moved.reshape(-1)


def _after(num_bytes: int, remainders: Crcs) -> Crcs:
    """What remainders have become after so many bytes of zeros."""
    by_bit = _BITS
    for _ in range(8):
        by_bit = (by_bit >> np.uint32(1)) ^ (by_bit & np.uint32(1)) * _POLYNOMIAL
    while num_bytes:
        if num_bytes & 1:
            remainders = _mapped(by_bit, remainders)
        by_bit, num_bytes = _mapped(by_bit, by_bit), num_bytes >> 1
    return remainders


def _mapped(by_bit: Crcs, remainders: Crcs) -> Crcs:
    """What a linear map makes of remainders, by what it makes of each bit."""
    found = np.zeros_like(remainders)
    for bit, image in enumerate(by_bit):
        found ^= (remainders >> np.uint32(bit) & 1) * image
    return found
