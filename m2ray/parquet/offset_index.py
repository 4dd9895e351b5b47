"""The offset index of a column chunk: where each page lies. A file may have many thousand pages, so numpy reads and writes it.

Every number and every tag in it is a varint of Thrift, all of seven for a page: a tag before each of its three numbers, and its end.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

PageLocations = npt.NDArray[np.int64]
"""Offset, bytes with the header, and first row in the row group of each page: int64 [pages, 3]."""

_TAGS = (0x16, 0x15, 0x16)  # the next field: of 64 bits, of 32, of 64
_LONGEST = 10  # bytes of a varint


def encode(chunks: Sequence[PageLocations]) -> list[bytes]:
    """structs.OFFSET_INDEX of each chunk's pages. All at once: of a chunk with a few pages numpy's calls take longer than its work."""
    pages = np.concatenate(chunks)
    columns, kept = [], []
    for number, tag in zip(pages.T, _TAGS, strict=True):
        groups = (number[:, None] << 1) >> (7 * np.arange(_LONGEST - 1))
        is_kept = (groups > 0) | (np.arange(_LONGEST - 1) == 0)
        has_next = np.zeros_like(is_kept)
        has_next[:, :-1] = is_kept[:, 1:]
        columns += [np.full((len(pages), 1), tag), groups & 0x7F | has_next << 7]
        kept += [np.ones((len(pages), 1), bool), is_kept]
    end = np.zeros((len(pages), 1), np.int64)
    octets, is_kept = np.concatenate([*columns, end], axis=1).astype(np.uint8), np.concatenate([*kept, end == 0], axis=1)
    body, starts = octets[is_kept].tobytes(), [0, *np.cumsum(is_kept.sum(axis=1)).tolist()]
    edges = [starts[number] for number in accumulate(map(len, chunks), initial=0)]
    return [_list_head(len(chunk)) + body[start:stop] + b"\0" for chunk, (start, stop) in zip(chunks, pairwise(edges), strict=True)]


def decode(data: bytes | bytearray | memoryview) -> PageLocations:
    """The pages of a structs.OFFSET_INDEX. Raises ValueError if it is none, or has other fields than those of its pages."""
    octets = np.frombuffer(data, np.uint8)
    is_long = len(octets) > 1 and octets[1] >> 4 == 15  # then its length is a number of its own
    octets = octets[2 + (int(np.argmax(octets[2:] < 0x80)) + 1 if is_long else 0) :]
    ends = np.flatnonzero(octets < 0x80) + 1
    lengths = np.diff(ends, prepend=0)
    if len(ends) % 7 != 1 or ends[-1] != len(octets) or lengths.max() >= _LONGEST:
        raise ValueError("an offset index is cut off")
    shifts = 7 * (np.arange(len(octets)) - np.repeat(ends - lengths, lengths))
    numbers = np.add.reduceat((octets & 0x7F).astype(np.int64) << shifts, ends - lengths)
    fields = numbers[:-1].reshape(-1, 7)
    if not len(fields) or numbers[-1] or (fields[:, ::2] != (*_TAGS, 0)).any() or bytes(data[: -len(octets)]) != _list_head(len(fields)):
        raise ValueError("an offset index has other fields than those of its pages")
    pages: PageLocations = fields[:, 1::2] >> 1
    return pages


def _list_head(count: int) -> bytes:
    """The head of field 1, a list of `count` structs."""
    if count < 15:
        return bytes([0x19, count << 4 | 0x0C])
    head = bytearray([0x19, 0xFC])
    while count >= 0x80:
        head.append(count & 0x7F | 0x80)
        count >>= 7
    return bytes(head) + bytes([count])
