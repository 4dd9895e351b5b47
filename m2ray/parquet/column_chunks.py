"""Column chunks: one column of one row group each. Integers are encoded by pyarrow; a fixed-size column's pages are its values' memory.

A required fixed-length column, plainly encoded, has pages whose body is the values one after the other: what a row-major array
is already. So they go to the store from where they lie; a library that encodes them copies them for nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from isal.isal_zlib import crc32

from m2ray.parquet import offset_index, structs
from m2ray.parquet.crcs import Crcs, crcs_of_pages
from m2ray.parquet.footer_crcs import footer_crcs
from m2ray.parquet.offset_index import PageLocations
from m2ray.parquet.page_header import page_header, page_headers
from m2ray.storage import Data
from m2ray.storage.hashing import HashingFile

Values = npt.NDArray[np.uint8]
"""[N, bytes of a value]"""

PAGE_BYTES = 128 << 10
PAGE_ROWS = 64
"""Of a page, at most, before compression: whoever needs one value reads its whole page, to hold it against its CRC. Smaller ones cost
more calls."""

_SENT_BYTES = 4 << 20
"""That are handed to the store at once: what a core has read for their CRCs is still in its cache."""

_SENT_BYTES_GIVEN_CRCS = 16 << 20
"""The same where CRCs came with the rows: each call gives Python's interpreter away."""

_MOST_PIECES = 1024  # that go to a disk at once

_ZSTD_LEVEL = 1  # higher ones gain nothing on bytes of floating-point numbers


_PAGE_OFFSETS = ("data_page_offset", "dictionary_page_offset")


def rows_of_page(value_bytes: int) -> int:
    """Rows of every page of a column but its last in a row group."""
    return max(1, min(PAGE_ROWS, PAGE_BYTES // value_bytes))


@dataclass(frozen=True)
class ColumnChunk:
    """One column of one row group, written or to be written.

    Attributes:
        meta_data: structs.COLUMN_META_DATA.
        pages: where each page lies.
        column_index: the bytes of its column index; empty if it has none.
    """

    meta_data: dict[str, Any]
    pages: PageLocations
    column_index: bytes = b""

    def moved(self, num_bytes: int) -> "ColumnChunk":
        """The same bytes, further on in a file."""
        offsets = {name: self.meta_data[name] + num_bytes for name in _PAGE_OFFSETS if name in self.meta_data}
        return ColumnChunk(self.meta_data | offsets, self.pages + np.array((num_bytes, 0, 0)), self.column_index)


@dataclass(frozen=True)
class EncodedColumns:
    """Several columns of one row group: `data` is their chunks, whose offsets count from its beginning."""

    num_rows: int
    data: bytes
    chunks: tuple[ColumnChunk, ...]


def encode_integers(table: Any, *, dictionary: Sequence[str], delta: Sequence[str], statistics: Sequence[str]) -> EncodedColumns:
    """A pyarrow table of integers as one row group, which may be written into any number of files; one without rows has no chunks.

    Args:
        table: its fields may not be null.
        dictionary: the columns of few different values.
        delta: those whose neighbours differ little.
        statistics: those that are given minimum and maximum, a page and a row group.
    """
    if not len(table):
        return EncodedColumns(0, b"", ())
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=len(table),
        compression="none",
        use_dictionary=list(dictionary),
        column_encoding=dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
        write_statistics=list(statistics),
        write_page_index=True,
        write_page_checksum=True,
        store_schema=False,
    )
    file = sink.getvalue().to_pybytes()
    footer, _ = structs.FILE_META_DATA.read(file, len(file) - 8 - int.from_bytes(file[-8:-4], "little"))
    (group,) = footer["row_groups"]
    start = len(structs.MAGIC)
    chunks = tuple(_chunk_of(file, column).moved(-start) for column in group["columns"])
    return EncodedColumns(len(table), file[start : start + group["total_compressed_size"]], chunks)


def _chunk_of(file: bytes, column: dict[str, Any]) -> ColumnChunk:
    """A column chunk of a whole file, with its part of the page index."""
    start = column["offset_index_offset"]
    pages = offset_index.decode(file[start : start + column["offset_index_length"]])
    start = column.get("column_index_offset", 0)
    return ColumnChunk(column["meta_data"], pages, file[start : start + column.get("column_index_length", 0)])


def write_values(file: HashingFile, column: tuple[str, int], rows: Values, crcs: Crcs | None = None) -> ColumnChunk:
    """Write a column of fixed-size values at the file's end, page by page, from where they lie.

    Args:
        file: what is being written; pages have a CRC, which the footer repeats, so its hash leaves them out.
        column: its name, and the bytes of one value.
        rows: the values, uint8 [N, bytes of a value].
        crcs: the CRC32 of each value, uint32 [N]; where None, those of the pages are made here, of their bytes.

    Raises:
        StoreError: the store refused.
    """
    return _write(file, column, len(rows), structs.UNCOMPRESSED, _as_they_lie(rows, column[1], crcs))


def write_made_values(
    file: HashingFile, column: tuple[str, int], rows: Values, values_of: Callable[[Values], Values], *, zstd: bool = False
) -> ColumnChunk:
    """As `write_values`, of values that are made from the rows, uint8 [N, any], a page at a time.

    Args:
        values_of: gives the values, uint8 [N, bytes of a value], of some of the rows.
        zstd: whether pages are compressed.
    """
    return _write(file, column, len(rows), structs.ZSTD if zstd else structs.UNCOMPRESSED, _made(rows, column[1], values_of, zstd=zstd))


_Pages = tuple[list[bytes], Sequence[Data], Crcs, int]
"""Some pages that are written at once: their headers, their bodies, the CRCs of these, and their bytes before compression."""


def _as_they_lie(rows: Values, value_bytes: int, crcs: Crcs | None) -> Iterator[_Pages]:
    page_rows = rows_of_page(value_bytes)
    page_bytes, plain = page_rows * value_bytes, np.ascontiguousarray(rows).reshape(-1).data
    bodies = [plain[at : at + page_bytes] for at in range(0, len(plain), page_bytes)]
    of_pages = None if crcs is None else crcs_of_pages(crcs, value_bytes, page_rows)
    at_once = min(_MOST_PIECES // 2, max(1, (_SENT_BYTES if of_pages is None else _SENT_BYTES_GIVEN_CRCS) // page_bytes))
    for first in range(0, len(bodies), at_once):
        some = bodies[first : first + at_once]
        of_some = np.array([*map(crc32, some)], np.uint32) if of_pages is None else of_pages[first : first + at_once]
        last_bytes = len(some[-1])
        whole = len(some) - (last_bytes < page_bytes)
        headers = _pieces_of(page_headers(page_rows, page_bytes, of_some[:whole]))
        if whole < len(some):
            headers += _pieces_of(page_headers(last_bytes // value_bytes, last_bytes, of_some[whole:]))
        yield headers, some, of_some, sum(map(len, some))


def _pieces_of(headers: Values) -> list[bytes]:
    data, size = headers.tobytes(), headers.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)]


def _made(rows: Values, value_bytes: int, values_of: Callable[[Values], Values], *, zstd: bool) -> Iterator[_Pages]:
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL) if zstd else None
    page_rows = rows_of_page(value_bytes)
    at_once = min(_MOST_PIECES // 2, max(1, _SENT_BYTES // (page_rows * value_bytes)))
    for first in range(0, len(rows), page_rows * at_once):
        headers, bodies, crcs = [], [], []
        some = rows[first : first + page_rows * at_once]
        for row in range(0, len(some), page_rows):
            values = np.ascontiguousarray(values_of(some[row : row + page_rows])).reshape(-1).data
            bodies.append(codec.compress(values, asbytes=True) if codec else values)
            crcs.append(crc32(bodies[-1]))
            headers.append(page_header(len(values) // value_bytes, len(values), len(bodies[-1]), crcs[-1]))
        yield headers, bodies, np.array(crcs, np.uint32), len(some) * value_bytes


def _write(file: HashingFile, column: tuple[str, int], num_values: int, codec: int, groups: Iterator[_Pages]) -> ColumnChunk:
    name, value_bytes = column
    begin, uncompressed_bytes = file.num_bytes, 0
    sizes: list[int] = []
    crcs = [np.zeros(0, np.uint32)]
    for headers, bodies, of_bodies, plain_bytes in groups:
        crcs.append(of_bodies)
        pieces: list[Data] = [b""] * (2 * len(bodies))
        pieces[::2], pieces[1::2] = headers, bodies
        file.write_pieces(pieces)
        header_bytes = [*map(len, headers)]
        sizes += map(add, header_bytes, map(len, bodies))
        uncompressed_bytes += sum(header_bytes) + plain_bytes
    pages = np.zeros((len(sizes), 3), np.int64)
    pages[:, 1] = sizes
    pages[:, 0] = begin + np.cumsum(pages[:, 1]) - pages[:, 1]
    pages[:, 2] = np.arange(len(sizes)) * rows_of_page(value_bytes)
    meta_data = {
        "type": structs.FIXED_LEN_BYTE_ARRAY,
        "encodings": [structs.PLAIN],
        "path_in_schema": [name.encode()],
        "codec": codec,
        "num_values": num_values,
        "total_uncompressed_size": uncompressed_bytes,
        "total_compressed_size": file.num_bytes - begin,
        "key_value_metadata": [footer_crcs(np.concatenate(crcs))],
        "data_page_offset": begin,
        "encoding_stats": [{"page_type": structs.DATA_PAGE, "encoding": structs.PLAIN, "count": len(pages)}],
    }
    return ColumnChunk(meta_data, pages)
