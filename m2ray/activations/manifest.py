"""The table of a run's committed parts: `manifest.parquet` once the run is finished, the same made from commits before."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m2ray.activations.job import JobRecord
from m2ray.activations.schema import FORMAT_VERSION, PART_NAME
from m2ray.batches import PartReceipt
from m2ray.errors import RunDamagedError
from m2ray.parquet.pages import MALFORMED
from m2ray.parquet.seal import require_seal, seal
from m2ray.storage import Store

MANIFEST_KEY = "manifest.parquet"

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("layer", pa.int32()),
        pa.field("key", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("xxh3", pa.string(), nullable=False),
        pa.field("token_digest", pa.string(), nullable=False),
        pa.field("tail_bytes", pa.int64()),
        pa.field("tail_xxh3", pa.string()),
    ]
)
"""One row a part, all fields of its receipt; `layer` is null at model-wide sites, `tail_bytes` and `tail_xxh3` in format 1. Sorted by site, layer and shard."""


_FIELDS = [(field.name, field) for field in MANIFEST_SCHEMA]
_COMMITS_A_BATCH = 256


def manifest_table(commits: Iterable[Mapping[str, Sequence[Any]]]) -> Any:
    """The parts of all shards as one sorted pyarrow table. Each commit comes as its columns (CommitRecord.columns)."""
    remaining = iter(commits)
    batches = []
    while some := list(islice(remaining, _COMMITS_A_BATCH)):
        columns = [pa.array(list(chain.from_iterable(commit[name] for commit in some)), field.type) for name, field in _FIELDS]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=MANIFEST_SCHEMA))
    return sorted_parts(batches)


def sorted_parts(batches: list[Any]) -> Any:
    """Record batches of MANIFEST_SCHEMA as one sorted table. They are taken out of the list, so that they go while the table comes."""
    table = pa.Table.from_batches(batches, schema=MANIFEST_SCHEMA)
    batches.clear()
    sites = table["site"].combine_chunks().dictionary_encode()
    ranks = np.argsort(np.argsort(sites.dictionary.to_pylist()))
    layers = table["layer"].fill_null(-1)  # a site of the whole model has no other ones
    order = pa.array(np.lexsort((table["shard"].to_numpy(), layers.to_numpy(), ranks[sites.indices.to_numpy()])))
    columns = table.columns
    del table
    for place, column in enumerate(columns):
        columns[place] = column.combine_chunks().take(order)
    return pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA)


def receipts_of(table: Any) -> list[PartReceipt]:
    """The rows of a (part of a) manifest table as receipts."""
    return [PartReceipt(**row) for row in table.to_pylist()]


def lost_parts(table: Any, listed: Mapping[str, int]) -> list[PartReceipt]:
    """The parts of a manifest table that are not `listed` (key to bytes), or with another size."""
    rows = enumerate(zip(table["key"].to_pylist(), table["num_bytes"].to_pylist(), strict=True))
    lost = [row for row, (key, num_bytes) in rows if listed.get(key) != num_bytes]
    return receipts_of(table.take(pa.array(lost, pa.int64())))


def manifest_file(table: Any, run_id: str) -> bytes:
    """The bytes of manifest.parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"m2ray.run_id": run_id}), sink, compression="zstd")
    return seal(memoryview(sink.getvalue()))


def read_manifest(store: Store, job: JobRecord, num_parts: int) -> Any:
    """The manifest of a finished run: a table of MANIFEST_SCHEMA.

    Raises:
        RunDamagedError: it is no Parquet file, not the one that was written, of another run, has not `num_parts` rows, or names a file
            outside of `data/`.
        StoreError: it cannot be read.
    """
    again = "Run the same extract command again: it writes the manifest from _commits/."
    remedy = again if job.format_version == FORMAT_VERSION else "Restore it from a copy; without _SUCCESS the run is read by its _commits/."
    try:
        data = store.read(MANIFEST_KEY)
        if job.format_version > 1:
            require_seal(data)
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)  # as in m2ray/sequences.py
    except (*MALFORMED, OSError) as error:
        raise RunDamagedError(f"{MANIFEST_KEY} of the run at {store.url} is damaged: {error}.", remedy) from error
    metadata = table.schema.metadata or {}
    if job.format_version == 1:
        for field in list(MANIFEST_SCHEMA)[len(table.schema) :]:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if not table.schema.equals(MANIFEST_SCHEMA) or metadata.get(b"m2ray.run_id") != job.run_id.encode() or len(table) != num_parts:
        raise RunDamagedError(
            f"{MANIFEST_KEY} of the run at {store.url} is not the one of run {job.run_id} with {num_parts} parts.", remedy
        )
    strange = table["key"].filter(pc.invert(pc.match_substring_regex(table["key"], f"^{PART_NAME}$")))
    if len(strange):
        raise RunDamagedError(f"{MANIFEST_KEY} of the run at {store.url} names {strange[0].as_py()!r}, which is no part.", remedy)
    return table
