"""PartWriter: one part on its way into the store, a row group a micro-batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from m2ray.activations.planes import split
from m2ray.activations.schema import TOKEN_FIELDS, Compression, part_key, part_schema
from m2ray.batches import Bits, PartReceipt, PartSpec
from m2ray.storage import Store
from m2ray.storage.hashing import HashingFile

# Random bits neither compress nor make a dictionary, and their minimum means nothing. Small batches and pages keep a page's
# copies in the processor's cache. The page index is how single rows are found (pages.py).
_PARQUET_OPTIONS = {
    "compression": {"activation_hi": "zstd"},
    "compression_level": {"activation_hi": 1},
    "use_dictionary": ["sequence_id", "token_id"],
    "column_encoding": {"position": "DELTA_BINARY_PACKED"},
    "write_statistics": ["sequence_id", "position"],
    "data_page_size": 1 << 17,
    "write_batch_size": 16,
    "write_page_index": True,
}


def token_columns(token_rows: npt.NDArray[Any]) -> list[Any]:
    """TOKEN_ROW [N] as pyarrow arrays, one a field: made once, used by every part."""
    return [pa.array(np.ascontiguousarray(token_rows[field.name]), type=field.type) for field in TOKEN_FIELDS]


class PartWriter:
    """One part. Its methods must not run at the same time; nothing is opened before the first `append`.

    Attributes:
        rows: tokens appended so far.
        receipt: set once the part is durable.
    """

    def __init__(
        self, store: Store, spec: PartSpec, run_metadata: Mapping[str, str], shard: int, attempt: str, compression: Compression = "none"
    ) -> None:
        self.spec = spec
        self._compression = compression
        self.rows = 0
        self.receipt: PartReceipt | None = None
        self._store = store
        self._shard = shard
        self._attempt = attempt
        self._key = part_key(spec, shard, attempt)
        self._schema = part_schema(spec, run_metadata, shard, attempt, compression)
        self._stream: HashingFile | None = None
        self._parquet: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes handed to the store so far."""
        return self._stream.num_bytes if self._stream else 0

    @property
    def store_s(self) -> float:
        """Seconds that the store took so far; the rest of what `append` and `finish` take is encoding."""
        return self._stream.store_s if self._stream else 0.0

    def append(self, tokens: list[Any], rows: Bits) -> None:
        """Append one micro-batch as one row group: the `token_columns` of its rows, and `rows` uint8 [N, W * itemsize].

        Raises:
            StoreError: the store refused; the part can only be aborted then.
        """
        if self._stream is None:
            self._stream = HashingFile(self._store.open_part(self._key))
            self._parquet = pq.ParquetWriter(pa.PythonFile(self._stream, mode="w"), self._schema, **_PARQUET_OPTIONS)
        columns = [_fixed_size_binary(column) for column in (split(rows) if self._compression == "planes" else (rows,))]
        self._parquet.write_table(pa.Table.from_arrays([*tokens, *columns], schema=self._schema), row_group_size=max(1, len(rows)))
        self.rows += len(rows)

    def finish(self, token_digest: str) -> None:
        """Write the footer, make the part durable and set `receipt`. Raises StoreError."""
        assert self._stream is not None, "a part has at least one micro-batch"
        self._parquet.close()
        self._stream.publish()
        self.receipt = PartReceipt(
            shard=self._shard,
            attempt=self._attempt,
            site=self.spec.site,
            layer=self.spec.layer,
            key=self._key,
            rows=self.rows,
            num_bytes=self._stream.num_bytes,
            xxh3=self._stream.xxh3,
            token_digest=token_digest,
        )

    def abort(self) -> None:
        """Leave nothing behind, finished or not. Raises StoreError if a finished part cannot be deleted."""
        if self.receipt is not None:
            self._store.delete([self._key])
            self.receipt = None
        elif self._stream is not None:
            # pyarrow writes a footer whenever its writer goes away: it must not reach a sink that is no more.
            self._stream.abort()
            self._parquet = None


def _fixed_size_binary(rows: Bits) -> Any:
    """uint8 [N, B] as N values of B bytes, without a copy."""
    bits = pa.py_buffer(np.ascontiguousarray(rows))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, bits])
