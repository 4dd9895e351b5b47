"""Column chunks: one column of one row group each. Integers are encoded by pyarrow; a fixed-size column's pages are its values' memory.

A required fixed-length column, plainly encoded, has pages whose body is the values one after the other: what a row-major array
is already. So they go to the store from where they lie; a library that encodes them copies them for nothing.
"""

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
from m2ray.parquet.page_crcs import page_crcs
from m2ray.parquet.page_header import page_header
from m2ray.storage.hashing import HashingFile

Values = npt.NDArray[np.uint8]
"""[N, bytes of a value]"""

PAGE_BYTES = 128 << 10
PAGE_ROWS = 64
"""Of a page, at most, before compression: whoever needs one value reads its whole page, to hold it against its CRC. Smaller ones cost
more calls."""

_SENT_BYTES = 4 << 20
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


def write_values(
    file: HashingFile, column: tuple[str, int], rows: Values, values_of: Callable[[Values], Values] | None = None, *, zstd: bool = False
) -> ColumnChunk:
    """Write a column of fixed-size values at the file's end, page by page.

    Args:
        file: what is being written; pages have a CRC, which the footer repeats, so its hash leaves them out.
        column: its name, and the bytes of one value.
        rows: what the values are made from, uint8 [N, any].
        values_of: gives the values, uint8 [N, bytes of a value], of some of the rows; None if the rows are the values.
        zstd: whether pages are compressed.

    Raises:
        StoreError: the store refused.
    """
    name, value_bytes = column
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL) if zstd else None
    begin, uncompressed_bytes, pages, pieces, crcs = file.num_bytes, 0, [], [], []
    at, sent_at, page_rows = begin, begin, rows_of_page(value_bytes)
    plain = None if values_of else np.ascontiguousarray(rows).reshape(-1).data
    for first_row in range(0, len(rows), page_rows):
        num_rows = min(page_rows, len(rows) - first_row)
        if values_of:
            values = np.ascontiguousarray(values_of(rows[first_row : first_row + num_rows])).reshape(-1).data
        else:
            assert plain is not None
            values = plain[first_row * value_bytes : (first_row + num_rows) * value_bytes]
        body = codec.compress(values, asbytes=True) if codec else values
        crcs.append(crc32(body))
        header = page_header(num_rows, len(values), len(body), crcs[-1])
        pages.append((at, len(header) + len(body), first_row))
        pieces += [header, body]
        at += len(header) + len(body)
        uncompressed_bytes += len(header) + len(values)
        if at - sent_at >= _SENT_BYTES or len(pieces) >= _MOST_PIECES:
            file.write_pieces(pieces)
            pieces, sent_at = [], at
    if pieces:
        file.write_pieces(pieces)
    meta_data = {
        "type": structs.FIXED_LEN_BYTE_ARRAY,
        "encodings": [structs.PLAIN],
        "path_in_schema": [name.encode()],
        "codec": structs.ZSTD if zstd else structs.UNCOMPRESSED,
        "num_values": len(rows),
        "total_uncompressed_size": uncompressed_bytes,
        "total_compressed_size": at - begin,
        "key_value_metadata": [page_crcs(crcs)],
        "data_page_offset": begin,
        "encoding_stats": [{"page_type": structs.DATA_PAGE, "encoding": structs.PLAIN, "count": len(pages)}],
    }
    return ColumnChunk(meta_data, np.array(pages, np.int64).reshape(-1, 3))
