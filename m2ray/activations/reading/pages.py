"""PartPages: the rows of a part by their numbers, so that a few are read without all that lies around them."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from m2ray.activations import planes
from m2ray.activations.schema import Compression, stored_columns
from m2ray.batches import Bits, Int64Array, PartSpec
from m2ray.errors import RunDamagedError
from m2ray.parquet.pages import MALFORMED, ColumnPages, columns_of, scratch_values
from m2ray.storage import Store

_READ_BYTES = 4 << 20


class PartPages:
    """One part's rows by their numbers, from 0 on: the values of all its columns, one after the other. Any number of threads may read.

    Args:
        store: the run folder.
        key: the part. It must have been opened by PartReader, which compares it with its commit.
        num_bytes: its size.
        tail: all that comes after its last row group.
        spec: its columns.
        compression: how they are stored.
        check: whether its pages have a CRC that they are held against.

    Raises:
        RunDamagedError: the pages cannot be found.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        num_bytes: int,
        tail: bytes | bytearray,
        spec: PartSpec,
        compression: Compression,
        *,
        check: bool,
    ) -> None:
        self._store = store
        self._key = key
        stored = [stored_columns(column, compression) for column in spec.columns]
        self._bytes_of_columns = [column.row_bytes for column in spec.columns]
        try:
            found = columns_of(store, key, num_bytes, tail, [each for of_column in stored for each in of_column], check=check)
            self._columns = [[next(found) for _ in of_column] for of_column in stored]
        except MALFORMED as error:
            raise self._damaged(f"its page index cannot be understood ({error})") from error

    def pieces(self, numbers: Int64Array) -> Iterator[tuple[int, int]]:
        """Cut ascending row numbers into pieces that are best read at once: [start, stop) places in `numbers`.

        Neighbours are one piece, and so are all rows of a page that has to be read as a whole. On a disk all rows of a column that is not
        compressed are: there the read itself joins neighbours.
        """
        first = self._columns[0][0]
        if self._store.folder and not first.is_compressed:
            if len(numbers):
                yield 0, len(numbers)
            return
        pages = first.pages_of(numbers)
        together = np.diff(pages) == 0
        if not first.is_read_by_page:
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
            if len(self._columns) == len(self._columns[0]) == 1:
                self._columns[0][0].take(numbers, out, places)
                return
            at = 0
            for stored, num_bytes in zip(self._columns, self._bytes_of_columns, strict=True):
                into = out if num_bytes == out.shape[1] else out[:, at : at + num_bytes]
                into[places] = _values(stored, numbers, num_bytes)
                at += num_bytes
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


def _values(stored: list[ColumnPages], numbers: Int64Array, num_bytes: int) -> Bits:
    """The values of a column in the rows of these ascending numbers, uint8 [N, bytes of a value], good until the next call."""
    pieces = []
    for purpose, pages in zip(("high", "low"), stored, strict=False):
        pieces.append(scratch_values(purpose, len(numbers), pages.value_bytes))
        pages.take(numbers, pieces[-1], np.arange(len(numbers)))
    if len(pieces) == 1:
        return pieces[0]
    return planes.join(pieces[0], pieces[1], scratch_values("joined", len(numbers), num_bytes))
