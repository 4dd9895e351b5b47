"""Rows of a file laid where they belong by the kernel itself: one copy, from the page cache to their place.

os.preadv takes a Python object for each row, and making those takes as long as the copy. So preadv(2) is called directly.
"""

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

_GAP_BYTES = 4096
_PIECES = 1024
"""preadv's limit: rows, and the gaps before rows."""

_LIBC = ctypes.CDLL(None)
_LIBC.preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_LIBC.preadv.restype = ctypes.c_ssize_t


def close_rows(offsets: npt.NDArray[np.int64], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows that begin at `offsets` into [start, stop) whose rows ascend with less than a page between them: at most 1,024 pieces."""
    if not len(offsets):
        return
    gaps = np.diff(offsets) - row_bytes
    for low, high in pairwise([0, *(np.flatnonzero((gaps < 0) | (gaps > _GAP_BYTES)) + 1).tolist(), len(offsets)]):
        has_gap = gaps[low : high - 1] > 0
        if high - low + np.count_nonzero(has_gap) <= _PIECES:
            yield low, high
            continue
        pieces = np.arange(high - low)
        pieces[1:] += np.cumsum(has_gap)
        start = 0
        while start < len(pieces):
            stop = int(np.searchsorted(pieces, pieces[start] + _PIECES))
            yield low + start, low + stop
            start = stop


def scattered(fd: int, offsets: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> bool:
    """Read rows that are close (`close_rows`): `out[places] = rows`, `out` uint8 [.., row bytes].

    Returns:
        Whether all of them were read; if not, any part of them may have been.
    """
    row_bytes: int = out.shape[1]
    assert out.flags.c_contiguous
    assert out.flags.writeable
    assert places.min() >= 0
    assert places.max() < len(out)
    between = np.empty(_GAP_BYTES, np.uint8)
    vector = np.empty((len(offsets), 2), np.int64)  # (address, bytes) of each piece
    np.multiply(places, row_bytes, out=vector[:, 0])
    vector[:, 0] += out.ctypes.data
    vector[:, 1] = row_bytes
    begin, num_bytes = int(offsets[0]), int(offsets[-1] - offsets[0]) + row_bytes
    if num_bytes > len(offsets) * row_bytes:
        gaps = np.diff(offsets) - row_bytes
        rows = np.flatnonzero(gaps) + 1
        vector = np.insert(vector, rows, np.column_stack([np.full(len(rows), between.ctypes.data), gaps[rows - 1]]), axis=0)
    count: int = _LIBC.preadv(fd, vector.ctypes.data, len(vector), begin)
    return count == num_bytes
