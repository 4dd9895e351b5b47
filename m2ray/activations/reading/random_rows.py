"""RandomRows: rows of one layer by their numbers, in any order, each read by itself."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np

from m2ray.activations.manifest import receipts_of
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.pages import PartPages
from m2ray.batches import Bits, Int64Array, PartSpec
from m2ray.errors import NotInRunError

_KEPT_PARTS = 4096
_REMOTE_READS_AT_ONCE = 32


class RandomRows:
    """The committed rows of one layer, numbered in the order of shards: those of `RunReader.tensor` and `tokens`.

    Where a part's rows lie is read once, 16 bytes a page, and kept for the parts used last.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec) -> None:
        self._catalogue = catalogue
        self._spec = spec
        self._parts = catalogue.parts_of(spec)
        self._first_rows = np.concatenate([[0], np.cumsum(self._parts["rows"].to_numpy())]).astype(np.int64)
        self.pages = lru_cache(_KEPT_PARTS)(self._open)

    @property
    def num_rows(self) -> int:
        return int(self._first_rows[-1])

    def read(self, indices: Sequence[int] | Int64Array) -> Bits:
        """The rows of these numbers, in their order: uint8 [N, bytes of a row].

        Raises:
            NotInRunError: a number is negative, or not below `num_rows`; or these are no numbers of rows, such as a mask.
            RunDamagedError: a file is not what its commit says.
        """
        numbers = _whole(indices)
        outside = numbers[(numbers < 0) | (numbers >= self.num_rows)]
        if len(outside):
            raise NotInRunError(f"There is no row {outside[0]}: rows 0 to {self.num_rows - 1} are committed.")
        order = np.argsort(numbers, kind="stable")
        ascending = numbers[order]
        rows = np.empty((len(numbers), self._spec.row_bytes), np.uint8)

        def take(piece: tuple[int, int, int]) -> None:
            part, start, stop = piece
            self.pages(part).take(ascending[start:stop] - self._first_rows[part], rows, order[start:stop])

        pieces = self._pieces(ascending)
        if self._catalogue.store.folder:
            for piece in pieces:
                take(piece)
        else:
            with ThreadPoolExecutor(_REMOTE_READS_AT_ONCE, thread_name_prefix="rows") as pool:
                for _ in pool.map(take, pieces):
                    pass
        return rows

    def _pieces(self, ascending: Int64Array) -> list[tuple[int, int, int]]:
        """(part, start, stop): the places [start, stop) of `ascending` that are read at once from a part."""
        parts = np.searchsorted(self._first_rows, ascending, "right") - 1
        edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(ascending)] if len(ascending) else [0]
        found: list[tuple[int, int, int]] = []
        for start, stop in pairwise(edges):
            part = int(parts[start])
            in_part = self.pages(part).pieces(ascending[start:stop] - self._first_rows[part])
            found += [(part, start + low, start + high) for low, high in in_part]
        return found

    def _open(self, part: int) -> PartPages:
        (receipt,) = receipts_of(self._parts.slice(part, 1))
        return self._catalogue.open_part(self._spec, receipt).pages()


def _whole(indices: Sequence[int] | Int64Array) -> Int64Array:
    """Numbers of rows, int64 [N]. Raises NotInRunError for what would be taken for other ones than were meant: a mask is no list of 0 and 1."""
    numbers = np.asarray(indices)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.ndim > 1):
        raise NotInRunError(
            f"Rows are asked for by their numbers, whole ones in one list, not by {numbers.dtype.name} {list(numbers.shape)}.",
            "Of a mask over run.tokens() give np.flatnonzero(mask).",
        )
    return numbers.reshape(-1).astype(np.int64)
