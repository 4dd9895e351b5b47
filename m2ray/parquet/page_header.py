"""The header of a data page: all of it follows from the page's rows and body, so a reader knows what it has to be, bit by bit."""

from functools import lru_cache

from isal import isal_zlib

from m2ray.parquet import structs
from m2ray.storage import Data


def page_header(num_values: int, values_bytes: int, body: Data) -> bytes:
    """The header of a page of required values, plainly encoded.

    Its `crc` is Parquet's: the CRC32 of the body as it is stored, after compression and without this header. It is written with
    as many bytes as the longest takes, so that pages of equal bodies are equally long.

    Args:
        num_values: values in the page.
        values_bytes: their bytes before compression.
        body: what follows the header.
    """
    crc = isal_zlib.crc32(body)
    number = crc << 1 if crc < 1 << 31 else (crc << 1 ^ 0x1FFFFFFFF)  # zigzag, of 32 bits with a sign
    before, after = _around_crc(num_values, values_bytes, len(body))
    return b"".join((before, _TWO_GROUPS[number & 0x3FFF], _TWO_GROUPS[number >> 14 & 0x3FFF], _LAST_GROUP[number >> 28], after))


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
