"""PartReader: one committed part, opened only if it is what its commit says."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from m2ray.activations.reading.pages import PartPages
from m2ray.activations.schema import FORMAT_VERSION, METADATA_PREFIX, ORIGIN, Compression, part_metadata, part_schema, stored_columns
from m2ray.batches import TOKEN_ROW, Bits, PartReceipt, PartSpec
from m2ray.errors import RunDamagedError
from m2ray.parquet.pages import MALFORMED, others, read_tail
from m2ray.storage import Store

_READ_BYTES = 4 << 20

Check = Literal["pages", "none"]
"""Whether what is read of a part is held against the digests that were written with it."""


class PartReader:
    """One part of a run: its tokens, and its rows by their numbers.

    Args:
        store: the run folder.
        spec: the site and layer that the part is of.
        run_metadata: what its footer has to say of the run.
        receipt: what its commit says.
        check: with "pages" all that is read is held against what was written, where it says so: tokens against their digest, pages
            against their CRC, which parts of format 1 have none of. Page indexes and footer are always.

    Raises:
        RunDamagedError: the file is absent, has another size, other page indexes, or its footer says anything else than it should.
        StoreError: it cannot be read.
    """

    def __init__(self, store: Store, spec: PartSpec, run_metadata: Mapping[str, str], receipt: PartReceipt, check: Check = "pages") -> None:
        self._url = store.where(receipt.key)
        self._store = store
        self._receipt = receipt
        self._spec = spec
        self._check = check == "pages"
        self._remedy = _REMEDY if run_metadata["format_version"] == str(FORMAT_VERSION) else "Restore it from a copy."
        num_bytes = store.size(receipt.key)
        if num_bytes != receipt.num_bytes:
            found = "is absent" if num_bytes is None else f"has {num_bytes} bytes"
            raise self._damaged(f"it {found}; {receipt.num_bytes} bytes were written")
        self._tail = self._understood(self._read_tail)
        self._metadata = self._understood(lambda: pq.read_metadata(pa.BufferReader(self._tail)))
        self._check_footer(run_metadata, receipt)

    @property
    def num_rows(self) -> int:
        return int(self._metadata.num_rows)

    def tokens(self) -> npt.NDArray[Any]:
        """Which token each row is: TOKEN_ROW [N]. Reads no activations.

        Raises:
            RunDamagedError: they are not those that were committed.
            StoreError: they cannot be read.
        """
        checked = self._check and self._receipt.tail_xxh3 is not None

        def read() -> Any:
            stream = pa.PythonFile(_TokenStream(self._store, self._receipt, _token_extents(self._metadata)), mode="r")
            # On this thread alone: as in m2ray/sequences.py.
            file = pq.ParquetFile(stream, metadata=self._metadata, page_checksum_verification=checked, pre_buffer=False)
            return _token_rows(file.read(list(TOKEN_ROW.names or ()), use_threads=False))

        rows: npt.NDArray[Any] = self._understood(read)
        if self._check and xxhash.xxh3_128_hexdigest(rows.view(np.uint8).data) != self._receipt.token_digest:
            raise self._damaged(f"its tokens do not have the digest that was committed, {self._receipt.token_digest}")
        return rows

    def sequence(self, sequence_id: int, num_rows: int) -> Bits:
        """The rows of one sequence: uint8 [N, bytes of a row]. Reads only the tokens and the pages that hold it.

        Raises:
            RunDamagedError: the part does not hold exactly `num_rows` positions of it, ascending.
            StoreError: it cannot be read.
        """
        tokens = self.tokens()
        start, stop = np.searchsorted(tokens["sequence_id"], [sequence_id, sequence_id + 1])
        if stop - start != num_rows or (np.diff(tokens["position"][start:stop]) <= 0).any():
            raise self._damaged(f"it does not hold the {num_rows} rows of sequence {sequence_id}")
        rows = np.empty((num_rows, self._spec.row_bytes), np.uint8)
        self.pages().read(int(start), rows)
        return rows

    def pages(self) -> PartPages:
        """Where each row lies. Raises RunDamagedError."""
        receipt, check = self._receipt, self._check and self._receipt.tail_xxh3 is not None
        return PartPages(self._store, receipt.key, receipt.num_bytes, self._tail, self._spec, self._compression, check=check)

    def require_whole(self) -> None:
        """Read every byte and raise RunDamagedError unless all are those that were written. Takes 4 MiB, and 16 bytes a row."""
        receipt, digest = self._receipt, xxhash.xxh3_64()
        stored = [each for column in self._spec.columns for each in stored_columns(column, self._compression)]
        names = [name for name, _ in stored] if receipt.tail_bytes is not None else []
        for offset, num_bytes in self._understood(lambda: list(others(self._tail, receipt.num_bytes, names))):
            for start in range(offset, offset + num_bytes, _READ_BYTES):
                digest.update(self._store.read_range(receipt.key, start, min(_READ_BYTES, offset + num_bytes - start)))
        if digest.hexdigest() != receipt.xxh3:
            raise self._damaged(f"the xxh3 of its bytes is {digest.hexdigest()}; {receipt.xxh3} was written")
        self.tokens()
        pages, at_once = self.pages(), max(1, _READ_BYTES // self._spec.row_bytes)
        rows = np.empty((at_once, self._spec.row_bytes), np.uint8)
        for start in range(0, receipt.rows, at_once):
            pages.read(start, rows[: receipt.rows - start])

    def _read_tail(self) -> bytearray:
        """All that comes after the last row group, held against its digest, which commits have since format 2."""
        receipt = self._receipt
        if receipt.tail_bytes is None:
            return read_tail(self._store, receipt.key, receipt.num_bytes)
        if not 8 <= receipt.tail_bytes <= receipt.num_bytes:
            raise ValueError(f"its commit says that {receipt.tail_bytes} of {receipt.num_bytes} bytes are page indexes and footer")
        tail = self._store.read_range(receipt.key, receipt.num_bytes - receipt.tail_bytes, receipt.tail_bytes)
        if xxhash.xxh3_64_hexdigest(tail) != receipt.tail_xxh3:
            raise ValueError("its page indexes or its footer are not what was written")
        return tail

    def _check_footer(self, run_metadata: Mapping[str, str], receipt: PartReceipt) -> None:
        schema = self._understood(self._metadata.schema.to_arrow_schema)
        if self.num_rows != receipt.rows:
            raise self._damaged(f"its footer says {self.num_rows} rows; {receipt.rows} were written")
        # What the footer itself says; the schema would say what a copy inside it, for Arrow's own use, says.
        footer = self._metadata.metadata or {}
        found = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in footer.items()}
        compression: Compression = "planes" if found.get("m2ray.compression") == "planes" else "none"
        wanted = part_metadata(self._spec, run_metadata, receipt.shard, receipt.attempt, compression)
        early = {METADATA_PREFIX + key for key in ORIGIN}  # the first runs of format 2 have no such keys
        differing = [
            f"{key} = {found.get(key, 'absent')}, not {value}"
            for key, value in wanted.items()
            if found.get(key, value if key in early else None) != value
        ]
        if differing:
            raise self._damaged(f"its footer says {'; '.join(differing)}")
        if not schema.equals(part_schema(self._spec, run_metadata, receipt.shard, receipt.attempt, compression)):
            raise self._damaged(f"its columns are {', '.join(str(field) for field in schema)}")
        self._compression = compression

    def _understood(self, read: Any) -> Any:
        """What `read` gives; what cannot be made sense of is a damaged file."""
        try:
            return read()
        except (*MALFORMED, OSError) as error:
            raise self._damaged(" ".join(str(error).split())) from error

    def _damaged(self, how: str) -> RunDamagedError:
        return RunDamagedError(f"{self._url} is damaged: {how}.", self._remedy)


_REMEDY = (
    "Restore it from a copy, or run `m2ray verify RUN --checksums --repair` and the same extract command: it extracts the shard again."
)


class _TokenStream:
    """The token columns of a part as the file object that pyarrow reads from: one request for each of `extents`, (start, stop)."""

    closed = False

    def __init__(self, store: Store, receipt: PartReceipt, extents: Sequence[tuple[int, int]]) -> None:
        self._store = store
        self._key = receipt.key
        self._num_bytes = receipt.num_bytes
        self._extents = extents
        self._position = 0
        self._start, self._data = 0, bytearray()

    def read(self, num_bytes: int) -> memoryview:
        if not self._start <= self._position < self._start + len(self._data):
            around = [extent for extent in self._extents if extent[0] <= self._position < extent[1]]
            if not around:
                raise LookupError(f"byte {self._position} is of no token column")
            self._start, stop = around[0]
            self._data = self._store.read_range(self._key, self._start, min(stop, self._num_bytes) - self._start)
        offset = self._position - self._start
        data = memoryview(self._data)[offset : offset + num_bytes]
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._num_bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is held open here."""


def _token_extents(metadata: Any) -> list[tuple[int, int]]:
    """Where the token columns lie, start and stop, in each row group: side by side."""
    names = TOKEN_ROW.names or ()
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [[column for column in map(group.column, range(group.num_columns)) if column.path_in_schema in names] for group in groups]
    return [
        (min(map(_first_byte, columns)), max(_first_byte(column) + column.total_compressed_size for column in columns))
        for columns in chunks
    ]


def _first_byte(column: Any) -> int:
    return int(column.dictionary_page_offset or column.data_page_offset)


def _token_rows(table: Any) -> npt.NDArray[Any]:
    rows = np.empty(len(table), TOKEN_ROW)
    for name in TOKEN_ROW.names or ():
        rows[name] = table[name].to_numpy()
    return rows
