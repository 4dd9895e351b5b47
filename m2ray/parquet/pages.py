"""ColumnPages: where each value of a column lies, so that a few are read without all that lies around them, and held against their CRC.

A column of fixed-size, never-null values is stored plainly: a page's body is the values one after the other, whole if the
column is not compressed. The offset index at the file's end says where each page begins, and which row is its first.
Source: https://parquet.apache.org/docs/file-format/pageindex/ and parquet.thrift of the same project.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from isal.isal_zlib import crc32

from m2ray.parquet import offset_index
from m2ray.parquet.column_chunks import Values
from m2ray.parquet.crcs import Crcs
from m2ray.parquet.footer_crcs import crcs_of
from m2ray.parquet.page_header import first_wrong, page_header
from m2ray.parquet.structs import DATA_PAGE, FILE_META_DATA, MAGIC, PAGE_HEADER, UNCOMPRESSED, ZSTD
from m2ray.storage import ReadPieces, Store, scratch

Rows = npt.NDArray[np.int64]

_RUN_BYTES = 512 << 10
"""Of pages that are read at once to be checked: they stay in the processor's cache until their values are where they belong."""

_REMOTE_RUN_BYTES = 8 << 20
"""The same of a server, where each read is a request."""

_MOST_PIECES = 1024
"""That are read at once, at most."""

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, pa.ArrowException)
"""What reading raises of a file that is not what it should be, besides the store's own errors."""


def read_footer(tail: bytes | bytearray) -> dict[str, Any]:
    """structs.FILE_META_DATA of the file that ends so. Raises MALFORMED."""
    footer_bytes = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or footer_bytes > len(tail) - 8:
        raise ValueError("there is no footer")
    return FILE_META_DATA.read(tail, len(tail) - 8 - footer_bytes)[0]


def read_tail(store: Store, key: str, num_bytes: int) -> bytearray:
    """All that comes after the last row group of a file of `num_bytes`: page indexes and footer. Raises StoreError and MALFORMED."""
    footer_bytes = int.from_bytes(store.read_range(key, num_bytes - 8, 4), "little") + 8
    if footer_bytes > num_bytes:
        raise ValueError("there is no footer")
    footer = read_footer(store.read_range(key, num_bytes - footer_bytes, footer_bytes))
    chunks = [chunk for group in footer["row_groups"] for chunk in group["columns"]]
    begin = min(chunk[name] for chunk in chunks for name in ("column_index_offset", "offset_index_offset") if name in chunk)
    if not 0 <= begin < num_bytes:
        raise ValueError(f"the page index is said to begin at byte {begin} of {num_bytes}")
    return store.read_range(key, begin, num_bytes - begin)


def columns_of(
    store: Store, key: str, num_bytes: int, tail: bytes | bytearray, columns: Sequence[tuple[str, int]], *, check: bool
) -> Iterator["ColumnPages"]:
    """The pages of the columns of these names and bytes a value. Raises MALFORMED if they cannot be found."""
    groups = read_footer(tail)["row_groups"]
    if not groups:
        no_pages = np.zeros((1, 3), np.int64)
        yield from (ColumnPages(store, key, num_bytes, size, UNCOMPRESSED, no_pages, None, check=check) for _, size in columns)
        return
    names = [chunk["meta_data"]["path_in_schema"][0].decode() for chunk in groups[0]["columns"]]
    begin = num_bytes - len(tail)
    for name, value_bytes in columns:
        chunks = [group["columns"][names.index(name)] for group in groups]
        pages, first_row = [], 0
        for chunk, group in zip(chunks, groups, strict=True):
            start = chunk["offset_index_offset"] - begin
            located = offset_index.decode(tail[start : start + chunk["offset_index_length"]])
            pages.append(located[:, [2, 0, 1]] + (first_row, 0, 0))
            first_row += group["num_rows"]
        codec = chunks[0]["meta_data"]["codec"]
        crcs = crcs_of([chunk["meta_data"] for chunk in chunks])
        yield ColumnPages(store, key, num_bytes, value_bytes, codec, np.concatenate([*pages, [(first_row, 0, 0)]]), crcs, check=check)


def others(tail: bytes | bytearray, num_bytes: int, columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what a file holds besides the pages of these columns, ascending. Raises MALFORMED."""
    at = 0
    for group in read_footer(tail)["row_groups"]:
        for meta_data in (chunk["meta_data"] for chunk in group["columns"]):
            if meta_data["path_in_schema"][0].decode() in columns:
                if not at <= meta_data["data_page_offset"] <= num_bytes:
                    raise ValueError("its columns do not lie one after the other")
                yield at, meta_data["data_page_offset"] - at
                at = meta_data["data_page_offset"] + meta_data["total_compressed_size"]
    yield at, num_bytes - at


class ColumnPages:
    """One column of a file. Any number of threads may read.

    Args:
        store: holds the file.
        key: the file's.
        num_bytes: its size.
        value_bytes: bytes of a value.
        codec: structs.UNCOMPRESSED or structs.ZSTD.
        pages: first row, offset and bytes of each page, int64 [pages + 1, 3]; the last row ends it.
        crcs: of each page, as the footer has them, uint32 [pages]; None where it has none.
        check: whether pages have a CRC and are held against it whenever they are read: the one in their header, and the footer's, since a
            page of another place or file has the first one right.

    Raises:
        ValueError: no pages of such a column lie so.
    """

    def __init__(
        self, store: Store, key: str, num_bytes: int, value_bytes: int, codec: int, pages: Rows, crcs: Crcs | None, *, check: bool
    ) -> None:
        if codec not in (UNCOMPRESSED, ZSTD):
            raise ValueError(f"codec {codec} is neither none nor zstd")
        self._store = store
        self._key = key
        self._check = check
        self._crcs = crcs
        self._run_bytes = _RUN_BYTES if store.folder else _REMOTE_RUN_BYTES
        self.value_bytes = value_bytes
        self.is_compressed = codec == ZSTD
        self._first_rows = pages[:, 0].copy()
        self._offsets, self._sizes = pages[:-1, 1].copy(), pages[:-1, 2].astype(np.int32)
        if crcs is not None and len(crcs) != len(self._offsets):
            raise ValueError(f"its footer has the CRC of {len(crcs)} of its {len(self._offsets)} pages")
        if (np.diff(self._first_rows) <= 0).any():
            raise ValueError("its pages do not ascend")
        if ((self._offsets < 0) | (pages[:-1, 2] <= 0) | (pages[:-1, 2] > num_bytes - self._offsets)).any():
            raise ValueError("a page lies outside the file")
        if not self.is_compressed and (self._sizes <= np.diff(self._first_rows) * value_bytes).any():
            raise ValueError("its pages are shorter than their rows")

    @property
    def is_read_by_page(self) -> bool:
        """Whether a page is always read as a whole."""
        return self.is_compressed or self._check

    @property
    def num_rows(self) -> int:
        return int(self._first_rows[-1])

    def pages_of(self, rows: Rows) -> Rows:
        """The number of the page that holds each row."""
        return np.searchsorted(self._first_rows, rows, "right") - 1

    def take(self, rows: Rows, out: Values, places: Rows) -> None:
        """Read the values of these ascending rows: `out[places] = values`.

        Raises:
            StoreError: the file cannot be read.
            MALFORMED: a page is not what it should be. Nothing in `out` is to be used then.
        """
        if not len(rows):
            return
        if self.is_read_by_page and not self.is_compressed and (np.diff(rows) == 1).all():
            self._take_neighbours(int(rows[0]), out, places)
            return
        pages = self.pages_of(rows)
        if self.is_read_by_page:
            self._take_pages(pages, rows, out, places)
            return
        headers = self._sizes[pages] - (self._first_rows[pages + 1] - self._first_rows[pages]) * self.value_bytes
        offsets = self._offsets[pages] + headers + (rows - self._first_rows[pages]) * self.value_bytes
        self._store.read_rows(self._key, offsets, out, places)

    def _take_neighbours(self, start: int, out: Values, places: Rows) -> None:
        """`take` of rows one after the other, of a column that is not compressed. Pages that lie side by side are read at once, some at a time,
        header and body apart: their values are checked and laid where they belong while the processor's cache has them.
        """
        stop = start + len(places)
        first, last = self.pages_of(np.array([start, stop - 1])).tolist()
        pages = np.arange(first, last + 1)
        sizes, lengths = self._sizes[pages], self._first_rows[pages + 1] - self._first_rows[pages]
        is_new = (np.diff(self._offsets[pages]) != sizes[:-1]) | (np.diff(sizes) != 0) | (np.diff(lengths) != 0)
        row = start
        with self._store.reading(self._key) as read:
            for low, high in pairwise([0, *(np.flatnonzero(is_new) + 1).tolist(), len(pages)]):
                until = min(stop, int(self._first_rows[first + high]))
                self._take_alike(read, (first + low, first + high), row, out, places[row - start : until - start])
                row = until

    def _take_alike(self, read: ReadPieces, pages: tuple[int, int], row: int, out: Values, places: Rows) -> None:
        """The values from `row` on, of pages [first, last) that lie side by side and are alike."""
        first, last = pages
        size, of_page = int(self._sizes[first]), int(self._first_rows[first + 1] - self._first_rows[first])
        body_bytes = of_page * self.value_bytes
        at_once = min(_MOST_PIECES // 2, max(1, self._run_bytes // size), last - first)
        data = scratch("bodies", at_once * body_bytes)
        bodies = [data[at : at + body_bytes] for at in range(0, len(data), body_bytes)]
        values = np.frombuffer(data, np.uint8).reshape(-1, self.value_bytes)
        headers = np.empty((last - first, size - body_bytes), np.uint8)
        crcs: list[int] = []
        row_of_page, done = row - int(self._first_rows[first]), 0
        for begin in range(first, last, at_once):
            pairs = list(zip(headers[begin - first :], bodies, strict=False))
            read(int(self._offsets[begin]), [piece for pair in pairs for piece in pair])
            crcs += [crc32(body) for _, body in pairs]
            wanted = values[row_of_page : min(len(pairs) * of_page, row_of_page + len(places) - done)]
            out[places[done : done + len(wanted)]] = wanted  # lets other threads run, as put() does only from 500 values on
            done, row_of_page = done + len(wanted), 0
        wrong = first_wrong(headers, of_page, body_bytes, crcs)
        if wrong is not None:
            raise ValueError(f"the bytes of page {first + wrong} do not have the CRC in its header")
        if self._crcs is not None and (astray := np.flatnonzero(self._crcs[first:last] != crcs)).size:
            raise ValueError(f"page {first + astray[0]} is not the one whose CRC the footer has")

    def _take_pages(self, pages: Rows, rows: Rows, out: Values, places: Rows) -> None:
        """`take` by whole pages, several that are alike at once."""
        edges = np.flatnonzero(np.diff(pages, prepend=-1, append=-1))
        touched = pages[edges[:-1]]
        sizes, lengths = self._sizes[touched], self._first_rows[touched + 1] - self._first_rows[touched]
        is_new = (np.diff(sizes) != 0) | (np.diff(lengths) != 0) | self.is_compressed
        for start, stop in pairwise([0, *(np.flatnonzero(is_new) + 1).tolist(), len(touched)]):
            at_once = max(1, self._run_bytes // int(sizes[start]))
            for first in range(start, stop, at_once):
                last = min(stop, first + at_once)
                values, of = self._read(touched[first:last]), slice(edges[first], edges[last])
                number = np.repeat(np.arange(last - first), np.diff(edges[first : last + 1]))
                out[places[of]] = values[number, rows[of] - self._first_rows[pages[of]]]

    def _read(self, pages: Rows) -> Values:
        """The values of pages of one size and length: uint8 [pages, rows, bytes of a value], this thread's until the next."""
        first, count = int(pages[0]), len(pages)
        size, num_rows = int(self._sizes[first]), int(self._first_rows[first + 1] - self._first_rows[first])
        data = scratch("pages", size * count)
        self._store.read_ranges(self._key, self._offsets[pages].tolist(), size, data)
        if self.is_compressed:
            return self._decompressed(first, data, num_rows)
        header_bytes = size - num_rows * self.value_bytes
        for number, page in enumerate(pages.tolist() if self._check else ()):
            self._require_header(page, data[number * size : (number + 1) * size], header_bytes, num_rows)
        return np.ndarray((count, num_rows, self.value_bytes), np.uint8, data, header_bytes, (size, self.value_bytes, 1))

    def _decompressed(self, page: int, data: memoryview, num_rows: int) -> Values:
        header, header_bytes = PAGE_HEADER.read(data)
        num_bytes = num_rows * self.value_bytes
        if header["type"] != DATA_PAGE or header["uncompressed_page_size"] != num_bytes:
            raise ValueError(f"page {page} has {header['uncompressed_page_size']} bytes, not {num_bytes}")
        if self._check:
            self._require_header(page, data, header_bytes, num_rows)
        plain = pa.decompress(data[header_bytes : header_bytes + header["compressed_page_size"]], num_bytes, "zstd")
        return np.frombuffer(plain, np.uint8).reshape(1, num_rows, self.value_bytes)

    def _require_header(self, page: int, data: memoryview, header_bytes: int, num_rows: int) -> None:
        """Raise ValueError unless a page's header is the very one that its body has, and its CRC the one in the footer."""
        crc = crc32(data[header_bytes:])
        if data[:header_bytes] != page_header(num_rows, num_rows * self.value_bytes, len(data) - header_bytes, crc):
            raise ValueError(f"the bytes of page {page} do not have the CRC in its header")
        if self._crcs is not None and self._crcs[page] != crc:
            raise ValueError(f"page {page} is not the one whose CRC the footer has")


def scratch_values(purpose: str, num_values: int, value_bytes: int) -> Values:
    """Memory for `num_values` values, this thread's until it asks for the same purpose again."""
    return np.frombuffer(scratch(purpose, num_values * value_bytes), np.uint8).reshape(-1, value_bytes)
