"""Window: the rows that are sorted by length together, on their way into shards and into `sequences/`."""

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from m2ray.prompts.masks import Document, Marked
from m2ray.prompts.shards import ShardCounts, cut_shards
from m2ray.prompts.spool import naming_disk
from m2ray.sequences import SEQUENCES_SCHEMA, SequencesWriter

_MARKS_SCHEMA = pa.schema([SEQUENCES_SCHEMA.field(name) for name in ("loss_mask", "roles", "documents")])
_NONE_KEPT = pa.schema([])
_UNMARKED = (None, None, None)
_ROW_GROUP_BYTES = 16 << 20
"""Of masks, roles and documents in one row group of `sequences/`, from which on it ends: a window of long prompts has gigabytes."""


class Window:
    """Rows as they come, which `finish` cuts into shards. Quarantined rows have token count 0. `kept` is the schema of the kept columns."""

    def __init__(self, first_id: int, kept: Any = _NONE_KEPT) -> None:
        self._first_id = first_id
        self._row_ids: list[str] = []
        self._digests: list[str | None] = []
        self._token_counts: list[int] = []
        self._row_counts: list[int] = []
        self._reasons: list[str | None] = []
        self._marks = MarksSpool(kept)

    def __len__(self) -> int:
        return len(self._row_ids)

    def add(self, row_id: str, digest: str, token_count: int, row_count: int) -> None:
        """Take the next row, which is ready."""
        self._add(row_id, digest, token_count, row_count, None)

    def quarantine(self, row_id: str, reason: str) -> None:
        """Take the next row, which cannot be used."""
        self._add(row_id, None, 0, 0, reason)

    def _add(self, row_id: str, digest: str | None, token_count: int, row_count: int, reason: str | None) -> None:
        self._row_ids.append(row_id)
        self._digests.append(digest)
        self._token_counts.append(token_count)
        self._row_counts.append(row_count)
        self._reasons.append(reason)

    def mark(self, rows: Sequence[Marked | str], kept: Sequence[tuple[Any, ...]] = ()) -> None:
        """Take what is known of the rows that were added since the last call, and their values of the kept columns."""
        self._marks.append(rows, kept)

    def close(self) -> None:
        """Delete what lies in the temporary folder."""
        self._marks.close()

    def finish(self, writer: SequencesWriter, first_shard: int, shard_tokens: int) -> list[ShardCounts]:
        """Fix the window's shards and write its rows."""
        sequence_ids = np.arange(self._first_id, self._first_id + len(self), dtype=np.int64)
        token_counts = np.array(self._token_counts, dtype=np.int32)
        row_counts = np.array(self._row_counts, dtype=np.int32)
        ready = np.flatnonzero(token_counts)
        shards = [ready[places] for places in cut_shards(token_counts[ready], shard_tokens)]
        numbers = np.zeros(len(self), np.int32)
        for number, places in enumerate(shards, first_shard):
            numbers[places] = number
        columns = {
            "sequence_id": pa.array(sequence_ids),
            "row_id": pa.array(self._row_ids),
            "prompt_digest": pa.array(self._digests, pa.string()),
            "token_count": pa.array(token_counts),
            "row_count": pa.array(row_counts),
            "shard": pa.array(numbers, mask=token_counts == 0),
            "status": pa.array(["ready" if reason is None else "quarantined" for reason in self._reasons]),
            "reason": pa.array(self._reasons, pa.string()),
        }
        start = 0
        for marks in self._marks.taken(len(self)):
            slices = {name: column.slice(start, marks.num_rows) for name, column in columns.items()}
            writer.write({**slices, **{name: marks[name] for name in marks.column_names}})
            start += marks.num_rows
        writer.end_window()
        return [(sequence_ids[places], token_counts[places], row_counts[places]) for places in shards]


class MarksSpool:
    """A window's loss masks, roles, documents and kept columns, compressed in the temporary folder until its shards are known. The file has no
    name, and may stay unmade.
    """

    def __init__(self, kept: Any = _NONE_KEPT) -> None:
        self._kept = kept
        self._file: Any = None
        self._stream: Any = None
        self._num_rows = 0

    def append(self, rows: Sequence[Marked | str], kept: Sequence[tuple[Any, ...]] = ()) -> None:
        """Add a batch of rows; as long as none has any of them, nothing is written. Raises StoreError if the disk is full."""
        known = [None if isinstance(row, str) else row for row in rows]
        if self._stream is None and not len(self._kept) and all(row is None or row[1:] == _UNMARKED for row in known):
            self._num_rows += len(rows)
            return
        with naming_disk():
            if self._stream is None:
                self._begin()
            self._stream.write_batch(_as_batch(known, kept, self._kept))
        self._num_rows += len(rows)

    def taken(self, num_rows: int) -> Iterator[Any]:
        """All of it, `num_rows` rows, as pyarrow tables of some megabytes."""
        if self._stream is None:
            schema = _with(self._kept)
            yield pa.table([pa.nulls(num_rows, field.type) for field in schema], schema=schema)
            return
        with naming_disk():
            self._stream.close()
            self._file.seek(0)
            batches: list[Any] = []
            for batch in pa.ipc.open_stream(self._file):
                batches.append(batch)
                if sum(each.nbytes for each in batches) >= _ROW_GROUP_BYTES:
                    yield pa.Table.from_batches(batches)
                    batches = []
            if batches:
                yield pa.Table.from_batches(batches)

    def close(self) -> None:
        """Delete the file."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        # Outlives this function by design: `close` ends it.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._stream = pa.ipc.new_stream(self._file, _with(self._kept), options=pa.ipc.IpcWriteOptions(compression="zstd"))
        if self._num_rows:
            self._stream.write_batch(_as_batch([None] * self._num_rows))


def _with(kept: Any) -> Any:
    return pa.schema([*_MARKS_SCHEMA, *kept])


def _as_batch(rows: Sequence[Marked | None], kept: Sequence[tuple[Any, ...]] = (), of_kept: Any = _NONE_KEPT) -> Any:
    masks = [None if row is None else row.loss_mask for row in rows]
    roles = [
        None if row is None or row.roles is None else [dict(zip(("role", "start", "stop"), one, strict=True)) for one in row.roles]
        for row in rows
    ]
    bounds = np.cumsum([0, *(len(mask or b"") for mask in masks)], dtype=np.int32)
    values = pa.array(np.frombuffer(b"".join(mask for mask in masks if mask), np.uint8))
    absent = pa.array([mask is None for mask in masks])
    lists = pa.ListArray.from_arrays(pa.array(bounds), values, mask=absent)
    documents = [None if row is None or row.documents is None else [Document._asdict(one) for one in row.documents] for row in rows]
    others = [pa.array(found, _MARKS_SCHEMA.field(name).type) for name, found in (("roles", roles), ("documents", documents))]
    cells = [pa.array([values[place] for values in kept], field.type) for place, field in enumerate(of_kept)]
    return pa.record_batch([lists, *others, *cells], schema=_with(of_kept))
