"""Rows of a file laid where they belong by the kernel itself: one copy, from the page cache to their place.

os.preadv takes a Python object for each row, and making those takes as long as the copy. So preadv(2) is called directly.
"""

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

_GAP_BYTES = 4096
_RUN_ROWS = 512  # with a gap before each but the first, preadv's limit of 1,024 pieces holds

_LIBC = ctypes.CDLL(None)
_LIBC.preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_LIBC.preadv.restype = ctypes.c_ssize_t


def close_rows(offsets: npt.NDArray[np.int64], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows that begin at `offsets` into [start, stop) whose rows ascend with less than a page between them: at most 512."""
    gaps = np.diff(offsets) - row_bytes
    for low, high in pairwise([0, *(np.flatnonzero((gaps < 0) | (gaps > _GAP_BYTES)) + 1).tolist(), len(offsets)]):
        for start in range(low, high, _RUN_ROWS):
            yield start, min(start + _RUN_ROWS, high)


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
    pieces = np.empty((len(offsets), 2, 2), np.uint64)  # (address, bytes) of the gap before each row, and of the row
    pieces[0, 0, 1], pieces[1:, 0, 1] = 0, np.diff(offsets) - row_bytes
    pieces[:, 0, 0], pieces[:, 1, 1] = between.ctypes.data, row_bytes
    pieces[:, 1, 0] = out.ctypes.data + places * row_bytes
    vector = pieces.reshape(-1, 2)[pieces[:, :, 1].ravel() > 0]
    begin, num_bytes = int(offsets[0]), int(offsets[-1] - offsets[0]) + row_bytes
    count: int = _LIBC.preadv(fd, vector.ctypes.data, len(vector), begin)
    return count == num_bytes
