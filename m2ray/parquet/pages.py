"""ColumnPages: where each value of a column lies, so that a few are read without all that lies around them.

A column of fixed-size, never-null values is stored plainly: a page's body is the values one after the other, whole if the
column is not compressed. The offset index at the file's end says where each page begins, and which row is its first.
Source: https://parquet.apache.org/docs/file-format/pageindex/ and parquet.thrift of the same project.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2ray.parquet.column_chunks import Values
from m2ray.parquet.structs import DATA_PAGE, FILE_META_DATA, MAGIC, OFFSET_INDEX, PAGE_HEADER, UNCOMPRESSED, ZSTD
from m2ray.storage import Store, scratch

Rows = npt.NDArray[np.int64]

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, pa.ArrowException)
"""What reading raises of a file that is not what it should be, besides the store's own errors."""


def columns_of(store: Store, key: str, num_bytes: int, columns: Sequence[tuple[str, int]]) -> Iterator["ColumnPages"]:
    """The pages of the columns of these names and bytes a value. Raises StoreError, and MALFORMED if they cannot be found."""
    tail = store.read_range(key, num_bytes - 8, 8)
    if tail[4:] != MAGIC:
        raise ValueError("there is no footer")
    footer_bytes = int.from_bytes(tail[:4], "little")
    footer, _ = FILE_META_DATA.read(store.read_range(key, num_bytes - 8 - footer_bytes, footer_bytes))
    groups = footer["row_groups"]
    names = [chunk["meta_data"]["path_in_schema"][0].decode() for chunk in groups[0]["columns"]]
    for name, value_bytes in columns:
        chunks = [group["columns"][names.index(name)] for group in groups]
        start = min(chunk["offset_index_offset"] for chunk in chunks)
        stop = max(chunk["offset_index_offset"] + chunk["offset_index_length"] for chunk in chunks)
        if not 0 <= start < stop <= num_bytes:
            raise ValueError(f"it is said to lie at bytes {start} to {stop} of {num_bytes}")
        index = store.read_range(key, start, stop - start)
        pages, first_row = [], 0
        for chunk, group in zip(chunks, groups, strict=True):
            located, _ = OFFSET_INDEX.read(index, chunk["offset_index_offset"] - start)
            pages += [
                (first_row + page["first_row_index"], page["offset"], page["compressed_page_size"]) for page in located["page_locations"]
            ]
            first_row += group["num_rows"]
        located_pages = np.array([*pages, (first_row, 0, 0)], np.int64)
        yield ColumnPages(store, key, num_bytes, value_bytes, chunks[0]["meta_data"]["codec"], located_pages)


class ColumnPages:
    """One column of a file. Any number of threads may read.

    Args:
        store: holds the file.
        key: the file's.
        num_bytes: its size.
        value_bytes: bytes of a value.
        codec: structs.UNCOMPRESSED or structs.ZSTD.
        pages: first row, offset and bytes of each page, int64 [pages + 1, 3]; the last row ends it.

    Raises:
        ValueError: no pages of such a column lie so.
    """

    def __init__(self, store: Store, key: str, num_bytes: int, value_bytes: int, codec: int, pages: Rows) -> None:
        if codec not in (UNCOMPRESSED, ZSTD):
            raise ValueError(f"codec {codec} is neither none nor zstd")
        self._store = store
        self._key = key
        self.value_bytes = value_bytes
        self.is_compressed = codec == ZSTD
        self._first_rows = pages[:, 0].copy()
        self._offsets, self._sizes = pages[:-1, 1].copy(), pages[:-1, 2].copy()
        if (np.diff(self._first_rows) <= 0).any():
            raise ValueError("its pages do not ascend")
        if ((self._offsets < 0) | (self._sizes <= 0) | (self._sizes > num_bytes - self._offsets)).any():
            raise ValueError("a page lies outside the file")
        if not self.is_compressed:
            headers = self._sizes - np.diff(self._first_rows) * value_bytes
            if (headers <= 0).any():
                raise ValueError("its pages are shorter than their rows")
            self._offsets += headers

    def pages_of(self, rows: Rows) -> Rows:
        """The number of the page that holds each row."""
        return np.searchsorted(self._first_rows, rows, "right") - 1

    def span(self, start: int, stop: int, purpose: str) -> Values:
        """The values of the rows [start, stop), this thread's until it asks for the same purpose again."""
        values = scratch_values(purpose, stop - start, self.value_bytes)
        if not self.is_compressed:
            self.take(np.arange(start, stop), values, np.arange(stop - start))
            return values
        first, last = self.pages_of(np.array([start, stop - 1])).tolist()
        for page in range(first, last + 1):
            begin, end = max(start, int(self._first_rows[page])), min(stop, int(self._first_rows[page + 1]))
            values[begin - start : end - start] = self._decompressed(page)[begin - self._first_rows[page] : end - self._first_rows[page]]
        return values

    def take(self, rows: Rows, out: Values, places: Rows) -> None:
        """Read the values of these ascending rows, of a column that is not compressed: `out[places] = values`."""
        pages = self.pages_of(rows)
        offsets = self._offsets[pages] + (rows - self._first_rows[pages]) * self.value_bytes
        self._store.read_rows(self._key, offsets, out, places)

    def _decompressed(self, page: int) -> Values:
        data = scratch("page", int(self._sizes[page]))
        self._store.read_into(self._key, int(self._offsets[page]), data)
        header, body = PAGE_HEADER.read(data)
        num_bytes = int(self._first_rows[page + 1] - self._first_rows[page]) * self.value_bytes
        if header["type"] != DATA_PAGE or header["uncompressed_page_size"] != num_bytes:
            raise ValueError(f"page {page} has {header['uncompressed_page_size']} bytes, not {num_bytes}")
        plain = pa.decompress(data[body : body + header["compressed_page_size"]], num_bytes, "zstd")
        return np.frombuffer(plain, np.uint8).reshape(-1, self.value_bytes)


def scratch_values(purpose: str, num_values: int, value_bytes: int) -> Values:
    """Room for so many values, this thread's until it asks for the same purpose again."""
    return np.frombuffer(scratch(purpose, num_values * value_bytes), np.uint8).reshape(-1, value_bytes)
