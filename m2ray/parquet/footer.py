"""Footer: what ends a file: the page index, and what the file is (Parquet's FileMetaData).

Source: https://parquet.apache.org/docs/file-format/ and parquet.thrift of the same project.
"""

import base64
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from m2ray.parquet import offset_index, structs
from m2ray.parquet.column_chunks import ColumnChunk

_FORMAT_VERSION = 2

MOST_ROW_GROUPS = 2**15 - 1
"""Parquet numbers them by 16 bits."""


class Footer:
    """Gathers row groups while they are written.

    Args:
        schema: a pyarrow schema of integers of 32 and 64 bits and fixed-size binaries, none of them nullable; and its metadata.
        created_by: which program writes the file, as "NAME version NUMBER".
    """

    def __init__(self, schema: Any, created_by: str) -> None:
        self._schema = schema
        self._created_by = created_by
        self._groups: list[tuple[int, int, Sequence[ColumnChunk]]] = []

    def add(self, begin: int, num_rows: int, chunks: Sequence[ColumnChunk]) -> None:
        """A row group that begins at byte `begin` of the file: one chunk a column."""
        assert len(self._groups) < MOST_ROW_GROUPS
        self._groups.append((begin, num_rows, chunks))

    def encode(self, begin: int) -> bytes:
        """All that comes after the last row group, which ends at byte `begin`."""
        index, columns = bytearray(), [[_column(chunk) for chunk in chunks] for _, _, chunks in self._groups]
        # A column's offset indexes lie side by side: whoever looks for its rows reads them at once.
        for number in range(len(self._schema)):
            for column, (_, _, chunks) in zip(columns, self._groups, strict=True):
                encoded = chunks[number].column_index
                if encoded:
                    column[number] |= {"column_index_offset": begin + len(index), "column_index_length": len(encoded)}
                    index += encoded
        for number in range(len(self._schema)):
            of_column = offset_index.encode([chunks[number].pages for _, _, chunks in self._groups]) if self._groups else []
            for column, encoded in zip(columns, of_column, strict=True):
                column[number] |= {"offset_index_offset": begin + len(index), "offset_index_length": len(encoded)}
                index += encoded
        file_meta_data = structs.FILE_META_DATA.write(
            {
                "version": _FORMAT_VERSION,
                "schema": _schema_elements(self._schema),
                "num_rows": sum(num_rows for _, num_rows, _ in self._groups),
                "row_groups": [_row_group(number, *group[:2], columns[number]) for number, group in enumerate(self._groups)],
                "key_value_metadata": _key_values(self._schema),
                "created_by": self._created_by.encode(),
                "column_orders": [{"type_order": {}}] * len(self._schema),
            }
        )
        return bytes(index) + file_meta_data + len(file_meta_data).to_bytes(4, "little") + structs.MAGIC


def _column(chunk: ColumnChunk) -> dict[str, Any]:
    return {"file_offset": 0, "meta_data": chunk.meta_data}  # the offset of a copy of the metadata: deprecated, and there is none


def _row_group(number: int, begin: int, num_rows: int, columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "columns": columns,
        "total_byte_size": sum(column["meta_data"]["total_uncompressed_size"] for column in columns),
        "num_rows": num_rows,
        "file_offset": begin,
        "total_compressed_size": sum(column["meta_data"]["total_compressed_size"] for column in columns),
        "ordinal": number,
    }


def _schema_elements(schema: Any) -> list[dict[str, Any]]:
    """The root and its columns."""
    root = {"repetition_type": structs.REQUIRED, "name": b"schema", "num_children": len(schema)}
    return [root, *({"repetition_type": structs.REQUIRED, "name": field.name.encode()} | _type(field.type) for field in schema)]


def _type(of: Any) -> dict[str, int]:
    if pa.types.is_fixed_size_binary(of):
        return {"type": structs.FIXED_LEN_BYTE_ARRAY, "type_length": of.byte_width}
    return {"type": {pa.int32(): structs.INT32, pa.int64(): structs.INT64}[of]}


def _key_values(schema: Any) -> list[dict[str, bytes]]:
    """The metadata, and the schema as Arrow's own readers expect it.

    Source of the last: https://github.com/apache/arrow/blob/main/cpp/src/parquet/arrow/writer.cc, GetSchemaMetadata.
    """
    pairs = dict(schema.metadata or {}) | {b"ARROW:schema": base64.b64encode(schema.serialize())}
    return [{"key": key, "value": value} for key, value in pairs.items()]
