"""The run's `sequences/*.parquet`: what became of every row of the source, quarantined ones too."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from m2ray.batches import SequenceFile
from m2ray.errors import RunDamagedError
from m2ray.storage import Store
from m2ray.storage.hashing import HashingFile

SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("sequence_id", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("prompt_digest", pa.string()),
        pa.field("token_count", pa.int32(), nullable=False),
        pa.field("shard", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("loss_mask", pa.list_(pa.uint8())),
        pa.field("roles", pa.list_(pa.struct([("role", pa.string()), ("start", pa.int32()), ("stop", pa.int32())]))),
        pa.field("row_count", pa.int32(), nullable=False),
        pa.field("documents", pa.list_(pa.struct([("row_id", pa.string()), ("start", pa.int32()), ("offset", pa.int32())]))),
    ]
)
"""One row a source row, ascending by sequence_id.

prompt_digest: xxh3-128 of the token ids' little-endian int32 bytes, 32 hex digits. status: "ready" or "quarantined". A
quarantined row has token_count 0, a reason, and null for all that is nullable besides; a ready one has null for the reason.
loss_mask: one 0 or 1 a token, null where the prompts gave none. roles: the tokens [start, stop) of a chat's messages, ascending,
null where unknown. row_count: how many of its tokens were chosen, hence its rows in every part; a mean is one. documents: where prompts are packed,
those of a context: each from the context's token `start` on, with its own token `offset`; else null. Behind them stand the columns that
`keep_columns` names, with the prompts' own values and types.
"""

_FEW_VALUES = ["shard", "status", "reason", "loss_mask.list.element", "roles.list.element.role", "row_count"]
"""The columns whose values come again and again."""

ROWS_PER_FILE = 1 << 20
BYTES_PER_FILE = 256 << 20
"""In memory: whoever reads masks reads a file of them, and a million long prompts have gigabytes."""


class SequencesWriter:
    """Writes the table window by window. A file ends with the window in which it comes to `ROWS_PER_FILE` rows or `BYTES_PER_FILE`.

    Unless finished, it deletes all that it wrote. `kept` is the schema of further columns, whose names SEQUENCES_SCHEMA has not.
    """

    def __init__(self, store: Store, attempt: str, kept: Any = ()) -> None:
        self._schema = pa.schema([*SEQUENCES_SCHEMA, *kept])
        self._store = store
        self._attempt = attempt
        self._files: list[SequenceFile] = []
        self._open: _OpenFile | None = None
        self._is_finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_finished and kind is None:
            return
        keys = [file.key for file in self._files]
        if self._open is not None:
            self._open.abort()
            keys.append(self._open.key)  # it may have been published just now
        self._store.delete(keys)

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows as one row group, given as one sequence of values a column. Raises StoreError."""
        if self._open is None:
            self._open = _OpenFile(self._store, f"sequences/sequences-{len(self._files):05d}-{self._attempt}.parquet", self._schema)
        self._open.write(pa.table(dict(columns), schema=self._schema))

    def end_window(self) -> None:
        """Say that the next rows are of other shards: only here a file ends. Raises StoreError."""
        if self._open is not None and (self._open.rows >= ROWS_PER_FILE or self._open.table_bytes >= BYTES_PER_FILE):
            self._close_file()

    def finish(self) -> tuple[SequenceFile, ...]:
        """Make the last file durable and return all of them, in order."""
        if self._open is not None:
            self._close_file()
        self._is_finished = True
        return tuple(self._files)

    def _close_file(self) -> None:
        assert self._open is not None
        self._files.append(self._open.close())
        self._open = None


def read_sequences(store: Store, file: SequenceFile, columns: list[str] | None = None) -> Any:
    """The file as a pyarrow table, after its size and checksum were compared. Columns that an older m2ray did not write are null, but
    `row_count`: there every token has a row.

    Raises:
        RunDamagedError: the file is absent or not as it was written.
        StoreError: it cannot be read.
    """
    name, remedy = store.where(file.key), "Restore it from a copy, or begin a new run in another folder."
    num_bytes = store.size(file.key)
    if num_bytes != file.num_bytes:
        has = "is absent" if num_bytes is None else f"has {num_bytes} bytes"
        raise RunDamagedError(f"{name} is damaged: it {has}; {file.num_bytes} bytes were written.", remedy)
    data = store.read(file.key)
    xxh3 = xxhash.xxh3_64_hexdigest(data)
    if xxh3 != file.xxh3:
        raise RunDamagedError(f"{name} is damaged: the xxh3 of its bytes is {xxh3}; {file.xxh3} was written.", remedy)
    # A thread of Arrow's that still holds `data`, a Python object, while the interpreter ends would abort the process.
    stored = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    names = list(dict.fromkeys([*SEQUENCES_SCHEMA.names, *stored.schema_arrow.names]) if columns is None else columns)
    absent = set(names) - set(stored.schema_arrow.names)
    table = stored.read(list(dict.fromkeys([*names, "token_count"])) if "row_count" in absent else names, use_threads=False)
    if not absent:
        return table
    for name in absent:
        field = SEQUENCES_SCHEMA.field(name)
        table = table.append_column(field, table["token_count"] if name == "row_count" else pa.nulls(table.num_rows, field.type))
    return table.select(names)


class _OpenFile:
    """A Parquet file on its way through a PartSink, hashed as it passes."""

    def __init__(self, store: Store, key: str, schema: Any) -> None:
        self.rows = self.table_bytes = 0
        self.key = key
        self._stream = HashingFile(store.open_part(key))
        self._writer = pq.ParquetWriter(pa.PythonFile(self._stream, mode="w"), schema, compression="zstd", use_dictionary=_FEW_VALUES)

    def write(self, table: Any) -> None:
        self._writer.write_table(table)
        self.rows += table.num_rows
        self.table_bytes += table.nbytes

    def close(self) -> SequenceFile:
        self._writer.close()
        self._stream.publish()
        return SequenceFile(self.key, self.rows, self._stream.num_bytes, self._stream.xxh3)

    def abort(self) -> None:
        self._stream.abort()
        self._writer.close()
