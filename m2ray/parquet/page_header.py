"""The header of a data page: all of it follows from the page's rows and body, so a reader knows what it has to be, bit by bit."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from m2ray.parquet import structs
from m2ray.parquet.crcs import Crcs


def page_header(num_values: int, values_bytes: int, body_bytes: int, crc: int) -> bytes:
    """The header of a page of required values, plainly encoded.

    Its `crc` is Parquet's: the CRC32 of the body as it is stored, after compression and without this header. It is written with
    as many bytes as the longest takes, so that pages of equal bodies are equally long.

    Args:
        num_values: values in the page.
        values_bytes: their bytes before compression.
        body_bytes: of what follows the header.
        crc: of that.
    """
    number = crc << 1 if crc < 1 << 31 else (crc << 1 ^ 0x1FFFFFFFF)  # zigzag, of 32 bits with a sign
    before, after = _around_crc(num_values, values_bytes, body_bytes)
    return b"".join((before, _TWO_GROUPS[number & 0x3FFF], _TWO_GROUPS[number >> 14 & 0x3FFF], _LAST_GROUP[number >> 28], after))


def page_headers(num_values: int, values_bytes: int, crcs: Crcs) -> npt.NDArray[np.uint8]:
    """What `page_header` makes of pages that are alike and not compressed, all at once: uint8 [pages, bytes of a header].

    Args:
        num_values: in each page.
        values_bytes: of each page's body.
        crcs: the CRC32 of each body, uint32 [pages].
    """
    before, after = _around_crc(num_values, values_bytes, values_bytes)
    headers = np.empty((len(crcs), len(before) + len(_GROUP_BITS) + len(after)), np.uint8)
    headers[:] = np.frombuffer(before + bytes(len(_GROUP_BITS)) + after, np.uint8)
    crc = crcs.astype(np.int64)[:, None]
    number = (crc << 1) ^ (crc >> 31) * 0x1FFFFFFFF  # zigzag, of 32 bits with a sign
    headers[:, len(before) : -len(after)] = (number >> _GROUP_BITS) & 0x7F | _GOES_ON
    return headers


def first_wrong(headers: npt.NDArray[np.uint8], num_values: int, values_bytes: int, crcs: Sequence[int]) -> int | None:
    """Of pages that are alike and not compressed the first whose header is not the one that `page_header` makes, or None.

    Args:
        headers: as they were read, uint8 [pages, bytes of a header].
        num_values: in each page.
        values_bytes: of each page's body.
        crcs: the CRC32 of each body.
    """
    expected = page_headers(num_values, values_bytes, np.array(crcs, np.uint32))
    if headers.shape != expected.shape:
        return 0
    is_right = headers == expected
    return None if is_right.all() else int(np.argmin(is_right.all(axis=1)))


_GROUP_BITS = np.array([0, 7, 14, 21, 28])
_GOES_ON = np.array([0x80, 0x80, 0x80, 0x80, 0])
"""Of the five groups of 7 bits that a varint of 33 bits takes."""

_TWO_GROUPS = [bytes((low | 0x80, high | 0x80)) for high in range(128) for low in range(128)]
"""Of a varint that goes on: 14 bits as two bytes."""

_LAST_GROUP = [bytes((group,)) for group in range(32)]


@lru_cache(256)
def _around_crc(num_values: int, values_bytes: int, body_bytes: int) -> tuple[bytes, bytes]:
    """The header's bytes before and after the number of its CRC."""
    until_crc = {
        "type": structs.DATA_PAGE,
        "uncompressed_page_size": values_bytes,
        "compressed_page_size": body_bytes,
        "crc": 0,
    }
    of_values = {  # there are no levels: their encodings are named because the format wants it
        "num_values": num_values,
        "encoding": structs.PLAIN,
        "definition_level_encoding": structs.RLE,
        "repetition_level_encoding": structs.RLE,
    }
    at = len(structs.PAGE_HEADER.write(until_crc)) - 2  # the CRC is 0, one byte; the struct's end is another
    whole = structs.PAGE_HEADER.write({**until_crc, "data_page_header": of_values})
    return whole[:at], whole[at + 1 :]
