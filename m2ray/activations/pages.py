"""PartPages: where each row of a part lies, so that a few rows are read without all that lies around them.

A column of fixed-size, never-null values is stored plainly: a page's body is the rows' bytes one after the other, whole if the
column is not compressed. The offset index at the file's end says where each page begins, and which row is its first.
Source: https://parquet.apache.org/docs/file-format/pageindex/ and parquet.thrift of the same project.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from m2ray.activations import planes
from m2ray.activations.parquet_format import DATA_PAGE, FILE_META_DATA, MAGIC, OFFSET_INDEX, PAGE_HEADER, UNCOMPRESSED, ZSTD
from m2ray.batches import Bits, Int64Array
from m2ray.errors import RunDamagedError
from m2ray.storage import Store, scratch

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


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
            self._columns = [_Column(store, key, num_bytes, *column) for column in self._indexes(num_bytes, columns)]
        except _MALFORMED as error:
            raise self._damaged(f"its page index cannot be understood ({error})") from error

    def pieces(self, numbers: Int64Array) -> Iterator[tuple[int, int]]:
        """Cut ascending row numbers, where each is read best: [start, stop) places in `numbers`.

        Neighbours are read together; of compressed pages all rows are, since the page is read as a whole anyway. On a disk all rows
        of a column that is not compressed are, since the store finds neighbours by itself and opens the file once.
        """
        if self._store.folder and not self._columns[0].is_compressed:
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
            rows = planes.join(high, low, _scratch_rows("joined", stop - start, out.shape[1]))
            out[places] = rows if len(rows) == len(numbers) else rows[numbers - start]
        except (*_MALFORMED, pa.ArrowException, OSError) as error:
            raise self._damaged(f"a page cannot be understood ({error})") from error

    def _indexes(self, num_bytes: int, columns: Sequence[tuple[str, int]]) -> Iterator[tuple[int, int, Any]]:
        """For each column: bytes a row, codec, and (first row, offset, bytes) of each page, int64 [pages + 1, 3]; the last row ends it."""
        tail = self._store.read_range(self._key, num_bytes - 8, 8)
        if tail[4:] != MAGIC:
            raise ValueError("there is no footer")
        footer_bytes = int.from_bytes(tail[:4], "little")
        footer, _ = FILE_META_DATA.read(self._store.read_range(self._key, num_bytes - 8 - footer_bytes, footer_bytes))
        groups = footer["row_groups"]
        names = [chunk["meta_data"]["path_in_schema"][0].decode() for chunk in groups[0]["columns"]]
        for name, row_bytes in columns:
            chunks = [group["columns"][names.index(name)] for group in groups]
            start = min(chunk["offset_index_offset"] for chunk in chunks)
            stop = max(chunk["offset_index_offset"] + chunk["offset_index_length"] for chunk in chunks)
            if not 0 <= start < stop <= num_bytes:
                raise ValueError(f"it is said to lie at bytes {start} to {stop} of {num_bytes}")
            index = self._store.read_range(self._key, start, stop - start)
            pages, first_row = [], 0
            for chunk, group in zip(chunks, groups, strict=True):
                located, _ = OFFSET_INDEX.read(index, chunk["offset_index_offset"] - start)
                pages += [
                    (first_row + page["first_row_index"], page["offset"], page["compressed_page_size"])
                    for page in located["page_locations"]
                ]
                first_row += group["num_rows"]
            yield row_bytes, chunks[0]["meta_data"]["codec"], np.array([*pages, (first_row, 0, 0)], np.int64)

    def _damaged(self, how: str) -> RunDamagedError:
        return RunDamagedError(f"{self._store.where(self._key)} is damaged: {how}.", "`m2ray verify RUN --checksums` reads every byte.")


class _Column:
    """One column of a part. `pages` as `PartPages._indexes` gives them."""

    def __init__(self, store: Store, key: str, num_bytes: int, row_bytes: int, codec: int, pages: Int64Array) -> None:
        if codec not in (UNCOMPRESSED, ZSTD):
            raise ValueError(f"codec {codec} is not one that m2ray writes")
        self._store = store
        self._key = key
        self.row_bytes = row_bytes
        self.is_compressed = codec == ZSTD
        self._first_rows = pages[:, 0].copy()
        self._offsets, self._sizes = pages[:-1, 1].copy(), pages[:-1, 2].copy()
        if (np.diff(self._first_rows) <= 0).any():
            raise ValueError("its pages do not ascend")
        if ((self._offsets < 0) | (self._sizes <= 0) | (self._sizes > num_bytes - self._offsets)).any():
            raise ValueError("a page lies outside the file")
        if not self.is_compressed:
            headers = self._sizes - np.diff(self._first_rows) * row_bytes
            if (headers <= 0).any():
                raise ValueError("its pages are shorter than their rows")
            self._offsets += headers

    def pages_of(self, rows: Int64Array) -> Int64Array:
        return np.searchsorted(self._first_rows, rows, "right") - 1

    def span(self, start: int, stop: int, purpose: str) -> Bits:
        """uint8 [N, row bytes], this thread's until it asks for the same purpose again."""
        rows = _scratch_rows(purpose, stop - start, self.row_bytes)
        if not self.is_compressed:
            self.take(np.arange(start, stop), rows, np.arange(stop - start))
            return rows
        first, last = self.pages_of(np.array([start, stop - 1])).tolist()
        for page in range(first, last + 1):
            begin, end = max(start, int(self._first_rows[page])), min(stop, int(self._first_rows[page + 1]))
            rows[begin - start : end - start] = self._decompressed(page)[begin - self._first_rows[page] : end - self._first_rows[page]]
        return rows

    def take(self, numbers: Int64Array, out: Bits, places: Int64Array) -> None:
        """As `PartPages.take`, of a column that is not compressed."""
        pages = self.pages_of(numbers)
        offsets = self._offsets[pages] + (numbers - self._first_rows[pages]) * self.row_bytes
        self._store.read_rows(self._key, offsets, out, places)

    def _decompressed(self, page: int) -> Bits:
        data = scratch("page", int(self._sizes[page]))
        self._store.read_into(self._key, int(self._offsets[page]), data)
        header, body = PAGE_HEADER.read(data)
        num_bytes = int(self._first_rows[page + 1] - self._first_rows[page]) * self.row_bytes
        if header["type"] != DATA_PAGE or header["uncompressed_page_size"] != num_bytes:
            raise ValueError(f"page {page} has {header['uncompressed_page_size']} bytes, not {num_bytes}")
        plain = pa.decompress(data[body : body + header["compressed_page_size"]], num_bytes, "zstd")
        return np.frombuffer(plain, np.uint8).reshape(-1, self.row_bytes)


def _scratch_rows(purpose: str, num_rows: int, row_bytes: int) -> Bits:
    return np.frombuffer(scratch(purpose, num_rows * row_bytes), np.uint8).reshape(-1, row_bytes)
