"""PartPages: the rows of a part by their numbers, so that a few are read without all that lies around them."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from m2ray.activations import planes
from m2ray.batches import Bits, Int64Array
from m2ray.errors import RunDamagedError
from m2ray.parquet.pages import MALFORMED, columns_of, scratch_values
from m2ray.storage import Store

_READ_BYTES = 4 << 20


class PartPages:
    """One part's rows by their numbers, from 0 on. Any number of threads may read.

    Args:
        store: the run folder.
        key: the part. It must have been opened by PartReader, which compares it with its commit.
        num_bytes: its size.
        tail: all that comes after its last row group.
        columns: name and bytes a row of its activation columns: one, or the two planes.
        check: whether its pages have a CRC that they are held against.

    Raises:
        RunDamagedError: the pages cannot be found.
    """

    def __init__(
        self, store: Store, key: str, num_bytes: int, tail: bytes | bytearray, columns: Sequence[tuple[str, int]], *, check: bool
    ) -> None:
        self._store = store
        self._key = key
        try:
            self._columns = list(columns_of(store, key, num_bytes, tail, columns, check=check))
        except MALFORMED as error:
            raise self._damaged(f"its page index cannot be understood ({error})") from error

    def pieces(self, numbers: Int64Array) -> Iterator[tuple[int, int]]:
        """Cut ascending row numbers into pieces that are best read at once: [start, stop) places in `numbers`.

        Neighbours are one piece, and so are all rows of a page that has to be read as a whole. On a disk all rows of a column that is not
        compressed are: there the read itself joins neighbours.
        """
        if self._store.folder and not self._columns[0].is_compressed:
            if len(numbers):
                yield 0, len(numbers)
            return
        pages = self._columns[0].pages_of(numbers)
        together = np.diff(pages) == 0
        if not self._columns[0].is_read_by_page:
            together &= np.diff(numbers) == 1
        edges = [0, *(np.flatnonzero(~together) + 1).tolist(), len(numbers)]
        yield from pairwise(edges)

    def take(self, numbers: Int64Array, out: Bits, places: Int64Array) -> None:
        """Read the rows of these ascending numbers and lay each at its place: `out[places] = rows`.

        Raises:
            RunDamagedError: a page is not what the index says, or what was written.
            StoreError: the part cannot be read.
        """
        try:
            if len(self._columns) == 1:
                self._columns[0].take(numbers, out, places)
                return
            high, low = (scratch_values(purpose, len(numbers), out.shape[1] // 2) for purpose in ("high", "low"))
            for column, half in zip(self._columns, (high, low), strict=True):
                column.take(numbers, half, np.arange(len(numbers)))
            out[places] = planes.join(high, low, scratch_values("joined", len(numbers), out.shape[1]))
        except (*MALFORMED, OSError) as error:
            raise self._damaged(f"a page cannot be understood ({error})") from error

    def read(self, start: int, out: Bits) -> None:
        """Read as many rows as `out` has, from the row `start` on. Raises as `take` does."""
        at_once = max(1, _READ_BYTES // out.shape[1])
        for first in range(0, len(out), at_once):
            rows = out[first : first + at_once]
            self.take(np.arange(start + first, start + first + len(rows)), rows, np.arange(len(rows)))

    def _damaged(self, how: str) -> RunDamagedError:
        return RunDamagedError(f"{self._store.where(self._key)} is damaged: {how}.", "`m2ray verify RUN --checksums` reads every byte.")
