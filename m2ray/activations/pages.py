"""PartPages: the rows of a part by their numbers, so that a few are read without all that lies around them."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from m2ray.activations import planes
from m2ray.batches import Bits, Int64Array
from m2ray.errors import RunDamagedError
from m2ray.parquet.pages import MALFORMED, columns_of, scratch_values
from m2ray.storage import LocalStore, Store


class PartPages:
    """One part's rows by their numbers, from 0 on. Any number of threads may read.

    Args:
        store: the run folder.
        key: the part. It must have been opened by PartReader, which compares it with its commit.
        num_bytes: its size.
        columns: name and bytes a row of its activation columns: one, or the two planes.

    Raises:
        RunDamagedError: the pages cannot be found.
        StoreError: the part cannot be read.
    """

    def __init__(self, store: Store, key: str, num_bytes: int, columns: Sequence[tuple[str, int]]) -> None:
        self._store = store
        self._key = key
        try:
            self._columns = list(columns_of(store, key, num_bytes, columns))
        except MALFORMED as error:
            raise self._damaged(f"its page index cannot be understood ({error})") from error

    def pieces(self, numbers: Int64Array) -> Iterator[tuple[int, int]]:
        """Cut ascending row numbers, where each is read best: [start, stop) places in `numbers`.

        Neighbours are read together; of compressed pages all rows are, since the page is read as a whole anyway. On a disk all rows
        of a column that is not compressed are, since the store finds neighbours by itself and opens the file once.
        """
        if isinstance(self._store, LocalStore) and not self._columns[0].is_compressed:
            if len(numbers):
                yield 0, len(numbers)
            return
        pages = self._columns[0].pages_of(numbers)
        together = np.diff(pages) == 0
        if not self._columns[0].is_compressed:
            together &= np.diff(numbers) == 1
        edges = [0, *(np.flatnonzero(~together) + 1).tolist(), len(numbers)]
        yield from pairwise(edges)

    def take(self, numbers: Int64Array, out: Bits, places: Int64Array) -> None:
        """Read the rows of these ascending numbers, and all between them, and lay each at its place: `out[places] = rows`.

        Raises:
            RunDamagedError: a page is not what the index says.
            StoreError: the part cannot be read.
        """
        try:
            if len(self._columns) == 1:
                self._columns[0].take(numbers, out, places)
                return
            start, stop = int(numbers[0]), int(numbers[-1]) + 1
            high, low = (column.span(start, stop, purpose) for column, purpose in zip(self._columns, ("high", "low"), strict=True))
            rows = planes.join(high, low, scratch_values("joined", stop - start, out.shape[1]))
            out[places] = rows if len(rows) == len(numbers) else rows[numbers - start]
        except (*MALFORMED, OSError) as error:
            raise self._damaged(f"a page cannot be understood ({error})") from error

    def _damaged(self, how: str) -> RunDamagedError:
        return RunDamagedError(f"{self._store.where(self._key)} is damaged: {how}.", "`m2ray verify RUN --checksums` reads every byte.")
