"""PartWriter: one part on its way into the store, a row group a micro-batch."""

from collections.abc import Iterator, Mapping, Sequence

import xxhash

from m2ray import __version__
from m2ray.activations import planes
from m2ray.activations.schema import Compression, part_key, part_schema, stored_columns
from m2ray.batches import Bits, PartReceipt, PartSpec
from m2ray.parquet.column_chunks import ColumnChunk, EncodedColumns, write_made_values, write_values
from m2ray.parquet.crcs import Crcs
from m2ray.parquet.footer import Footer
from m2ray.parquet.structs import MAGIC
from m2ray.storage import Store
from m2ray.storage.hashing import HashingFile


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
        self._file: HashingFile | None = None
        self._tail = b""
        self._footer = Footer(part_schema(spec, run_metadata, shard, attempt, compression), f"m2ray version {__version__}")

    @property
    def num_bytes(self) -> int:
        """Bytes handed to the store so far."""
        return self._file.num_bytes if self._file else 0

    @property
    def store_s(self) -> float:
        """Seconds that the store took so far; the rest of what `append` and `finish` take is encoding."""
        return self._file.store_s if self._file else 0.0

    def append(self, tokens: EncodedColumns, columns: Sequence[Bits], crcs: Sequence[Crcs] = ()) -> None:
        """Append one micro-batch as one row group, if it has rows: its tokens, and the values of each column, uint8 [N, W * itemsize].

        `crcs` are of each column those of its rows, uint32 [N]; where there are none, pages' are made of their bytes.

        Raises:
            StoreError: the store refused; the part can only be aborted then.
        """
        assert [values.shape for values in columns] == [(tokens.num_rows, column.row_bytes) for column in self.spec.columns]
        if self._file is None:
            self._file = HashingFile(self._store.open_part(self._key))
            self._file.write(MAGIC)
        if not tokens.num_rows:  # an empty row group trips readers
            return
        begin = self._file.num_bytes
        self._file.write(tokens.data)
        chunks = [chunk.moved(begin) for chunk in tokens.chunks]
        self._footer.add(begin, tokens.num_rows, [*chunks, *self._write_values(self._file, columns, crcs or [None] * len(columns))])
        self.rows += tokens.num_rows

    def _write_values(self, file: HashingFile, columns: Sequence[Bits], crcs: Sequence[Crcs | None]) -> Iterator[ColumnChunk]:
        for column, values, of_rows in zip(self.spec.columns, columns, crcs, strict=True):
            stored = stored_columns(column, self._compression)
            if len(stored) == 1:
                yield write_values(file, stored[0], values, of_rows)
            else:
                yield write_made_values(file, stored[0], values, planes.high, zstd=True)
                yield write_made_values(file, stored[1], values, planes.low)

    def seal(self) -> None:
        """Write what comes after the last row group. Raises StoreError."""
        assert self._file is not None, "a part has at least one micro-batch"
        self._tail = self._footer.encode(self._file.num_bytes)
        self._file.write(self._tail)

    def finish(self, token_digest: str) -> None:
        """Make a sealed part durable and set `receipt`. Raises StoreError."""
        assert self._file is not None, "it is sealed"
        self._file.publish()
        self.receipt = PartReceipt(
            shard=self._shard,
            attempt=self._attempt,
            site=self.spec.site,
            layer=self.spec.layer,
            key=self._key,
            rows=self.rows,
            num_bytes=self._file.num_bytes,
            xxh3=self._file.xxh3,
            token_digest=token_digest,
            tail_bytes=len(self._tail),
            tail_xxh3=xxhash.xxh3_64_hexdigest(self._tail),
        )

    def abort(self) -> None:
        """Leave nothing behind, finished or not. Raises StoreError if a finished part cannot be deleted."""
        if self.receipt is not None:
            self._store.delete([self._key])
            self.receipt = None
        elif self._file is not None:
            self._file.abort()
