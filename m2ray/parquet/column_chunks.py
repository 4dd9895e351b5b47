"""Column chunks: one column of one row group each. Integers are encoded by pyarrow; a fixed-size column's pages are its values' memory.

A required fixed-length column, plainly encoded, has pages whose body is the values one after the other: what a row-major array
is already. So they go to the store from where they lie; a library that encodes them copies them for nothing.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from isal.isal_zlib import crc32

from m2ray.parquet import offset_index, structs
from m2ray.parquet.offset_index import PageLocations
from m2ray.parquet.page_header import headers_alike, page_header
from m2ray.storage.hashing import HashingFile

Values = npt.NDArray[np.uint8]
"""[N, bytes of a value]"""

PAGE_BYTES = 128 << 10
PAGE_ROWS = 64
"""Of a page, at most, before compression: whoever needs one value reads its whole page, to hold it against its CRC. Smaller ones cost
more calls."""

_SENT_BYTES = 4 << 20
_MOST_PIECES = 1024  # that go to a disk at once

_ONE_AT_A_TIME = threading.Lock()
"""Of the writer's threads, for pages' CRCs, which give the interpreter away and want it back every few microseconds: eight of them leave none of it to the
thread that launches layers."""

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


def write_values(
    file: HashingFile, column: tuple[str, int], rows: Values, values_of: Callable[[Values], Values] | None = None, *, zstd: bool = False
) -> ColumnChunk:
    """Write a column of fixed-size values at the file's end, page by page.

    Args:
        file: what is being written; the pages say by themselves whether they are whole, so its hash leaves them out.
        column: its name, and the bytes of one value.
        rows: what the values are made from, uint8 [N, any].
        values_of: gives the values, uint8 [N, bytes of a value], of some of the rows; None if the rows are the values.
        zstd: whether pages are compressed.

    Raises:
        StoreError: the store refused.
    """
    name, value_bytes = column
    begin = file.num_bytes
    if values_of or zstd:
        pages, uncompressed_bytes = _write_made(file, value_bytes, rows, values_of, zstd=zstd)
    else:
        pages, uncompressed_bytes = _write_plain(file, value_bytes, rows)
    meta_data = {
        "type": structs.FIXED_LEN_BYTE_ARRAY,
        "encodings": [structs.PLAIN],
        "path_in_schema": [name.encode()],
        "codec": structs.ZSTD if zstd else structs.UNCOMPRESSED,
        "num_values": len(rows),
        "total_uncompressed_size": uncompressed_bytes,
        "total_compressed_size": file.num_bytes - begin,
        "data_page_offset": begin,
        "encoding_stats": [{"page_type": structs.DATA_PAGE, "encoding": structs.PLAIN, "count": len(pages)}],
    }
    return ColumnChunk(meta_data, pages)


def _write_plain(file: HashingFile, value_bytes: int, rows: Values) -> tuple[PageLocations, int]:
    """Write pages that are the rows' own memory, and give where they lie and their bytes. What is done for each of them alone is its CRC."""
    data = np.ascontiguousarray(rows).reshape(-1).data
    page_bytes = rows_of_page(value_bytes) * value_bytes
    at_once, whole = page_bytes * max(1, min(_MOST_PIECES // 2, _SENT_BYTES // page_bytes)), len(data) // page_bytes * page_bytes
    alike = [(first, min(first + at_once, whole), page_bytes) for first in range(0, whole, at_once)]
    alike += [(whole, len(data), len(data) - whole)] if whole < len(data) else []
    located, begin = [np.empty((0, 3), np.int64)], file.num_bytes
    for first, last, size in alike:
        bodies = [data[at : at + size] for at in range(first, last, size)]
        with _ONE_AT_A_TIME:
            crcs = list(map(crc32, bodies))
        headers = headers_alike(size // value_bytes, size, crcs)
        number, header_bytes = np.arange(len(bodies)), headers.shape[1]
        page = header_bytes + size
        located.append(
            np.stack([file.num_bytes + number * page, np.full_like(number, page), (first + number * size) // value_bytes], axis=1)
        )
        text = headers.reshape(-1).data
        cut = [text[at : at + header_bytes] for at in range(0, len(text), header_bytes)]
        file.write_pieces([piece for pair in zip(cut, bodies, strict=True) for piece in pair])
    return np.concatenate(located), file.num_bytes - begin


def _write_made(
    file: HashingFile, value_bytes: int, rows: Values, values_of: Callable[[Values], Values] | None, *, zstd: bool
) -> tuple[PageLocations, int]:
    """Write pages that are made of the rows, and give where they lie and their bytes before compression."""
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL) if zstd else None
    uncompressed_bytes, pages, pieces = 0, [], []
    at, sent_at, page_rows = file.num_bytes, file.num_bytes, rows_of_page(value_bytes)
    for first_row in range(0, len(rows), page_rows):
        some = rows[first_row : first_row + page_rows]
        values = np.ascontiguousarray(values_of(some) if values_of else some).reshape(-1).data
        body = codec.compress(values, asbytes=True) if codec else values
        header = page_header(len(some), len(values), body)
        pages.append((at, len(header) + len(body), first_row))
        pieces += [header, body]
        at += len(header) + len(body)
        uncompressed_bytes += len(header) + len(values)
        if at - sent_at >= _SENT_BYTES or len(pieces) >= _MOST_PIECES:
            file.write_pieces(pieces)
            pieces, sent_at = [], at
    if pieces:
        file.write_pieces(pieces)
    return np.array(pages, np.int64).reshape(-1, 3), uncompressed_bytes
