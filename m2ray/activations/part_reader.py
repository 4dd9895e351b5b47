"""PartReader: one committed part, opened only if it is what its commit says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from m2ray.activations.pages import PartPages
from m2ray.activations.planes import join
from m2ray.activations.schema import Compression, activation_columns, part_metadata, part_schema
from m2ray.batches import TOKEN_ROW, Bits, PartReceipt, PartSpec
from m2ray.errors import RunDamagedError
from m2ray.storage import Store


@dataclass(frozen=True)
class PartRows:
    """Rows of one part: `tokens` TOKEN_ROW [N], and `bits` uint8 [N, W * itemsize], which is read-only."""

    tokens: npt.NDArray[Any]
    bits: Bits

    def __len__(self) -> int:
        return len(self.tokens)


class PartReader:
    """One part of a run, read by row groups (one a micro-batch).

    Args:
        store: the run folder.
        spec: the site and layer that the part is of.
        run_metadata: what its footer has to say of the run.
        receipt: what its commit says.

    Raises:
        RunDamagedError: the file is absent, has another size, or its footer says anything else than it should.
        StoreError: it cannot be read.
    """

    def __init__(self, store: Store, spec: PartSpec, run_metadata: Mapping[str, str], receipt: PartReceipt) -> None:
        self._url = store.where(receipt.key)
        self._store = store
        self._receipt = receipt
        self._spec = spec
        self._remedy = "Restore it from a copy, or run `m2ray verify RUN --checksums --repair` and the same extract command again: it does the shard anew."
        num_bytes = store.size(receipt.key)
        if num_bytes != receipt.num_bytes:
            found = "is absent" if num_bytes is None else f"has {num_bytes} bytes"
            raise self._damaged(f"it {found}; {receipt.num_bytes} bytes were written")
        stream = pa.PythonFile(_StoreStream(store, receipt.key, receipt.num_bytes), mode="r")
        self._parquet = self._understood(lambda: pq.ParquetFile(stream))
        self._check_footer(run_metadata, receipt)

    @property
    def num_rows(self) -> int:
        return int(self._parquet.metadata.num_rows)

    def row_groups(self) -> Iterator[PartRows]:
        """All rows, a row group at a time."""
        for number in range(self._parquet.num_row_groups):
            yield self._read(number)

    def tokens(self) -> npt.NDArray[Any]:
        """Which token each row is: TOKEN_ROW [N]. Reads no activations."""
        return _token_rows(self._understood(lambda: self._parquet.read(list(TOKEN_ROW.names or ()))))

    def sequence(self, sequence_id: int, num_tokens: int) -> Bits:
        """The rows of one sequence: uint8 [T, W * itemsize], read-only. Reads only the row group that holds it.

        Raises:
            RunDamagedError: the part does not hold exactly the positions 0 to `num_tokens` - 1 of it.
        """
        # The two columns are run-length encoded: a few KB for the whole part.
        tokens = self._understood(lambda: self._parquet.read(["sequence_id", "position"]))
        start, stop = np.searchsorted(tokens["sequence_id"].to_numpy(), [sequence_id, sequence_id + 1])
        if not np.array_equal(tokens["position"].to_numpy()[start:stop], np.arange(num_tokens)):
            raise self._damaged(f"it does not hold the {num_tokens} positions of sequence {sequence_id}")
        first_row = 0
        for number in range(self._parquet.num_row_groups):
            num_rows = self._parquet.metadata.row_group(number).num_rows
            if first_row <= start and stop <= first_row + num_rows:
                return self._read(number).bits[start - first_row : stop - first_row]
            first_row += num_rows
        raise self._damaged(f"sequence {sequence_id} lies in no one row group")

    def pages(self) -> PartPages:
        """Where each row lies. Raises RunDamagedError or StoreError."""
        return PartPages(self._store, self._receipt.key, self._receipt.num_bytes, self._columns)

    def _read(self, number: int) -> PartRows:
        table = self._understood(lambda: self._parquet.read_row_group(number))
        columns = [_bytes_of(table[name], num_bytes) for name, num_bytes in self._columns]
        if len(columns) == 1:
            return PartRows(_token_rows(table), columns[0])
        high, low = columns
        return PartRows(_token_rows(table), join(high, low, np.empty((len(high), 2 * high.shape[1]), np.uint8)))

    def _check_footer(self, run_metadata: Mapping[str, str], receipt: PartReceipt) -> None:
        schema = self._parquet.schema_arrow
        if self.num_rows != receipt.rows:
            raise self._damaged(f"its footer says {self.num_rows} rows; {receipt.rows} were written")
        # What the footer itself says; schema_arrow would say what a copy inside it, for Arrow's own use, says.
        footer = self._parquet.metadata.metadata or {}
        found = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in footer.items()}
        compression: Compression = "planes" if found.get("m2ray.compression") == "planes" else "none"
        wanted = part_metadata(self._spec, run_metadata, receipt.shard, receipt.attempt, compression)
        differing = [f"{key} = {found.get(key, 'absent')}, not {value}" for key, value in wanted.items() if found.get(key) != value]
        if differing:
            raise self._damaged(f"its footer says {'; '.join(differing)}")
        if not schema.equals(part_schema(self._spec, run_metadata, receipt.shard, receipt.attempt, compression)):
            raise self._damaged(f"its columns are {', '.join(str(field) for field in schema)}")
        self._columns = activation_columns(self._spec, compression)

    def _understood(self, read: Any) -> Any:
        """What `read` gives; what pyarrow cannot make sense of is a damaged file."""
        try:
            return read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(f"pyarrow says: {' '.join(str(error).split())}") from error

    def _damaged(self, how: str) -> RunDamagedError:
        return RunDamagedError(f"{self._url} is damaged: {how}.", self._remedy)


class _StoreStream:
    """An object of the store as the file object that pyarrow reads from."""

    closed = False

    def __init__(self, store: Store, key: str, num_bytes: int) -> None:
        self._store = store
        self._key = key
        self._num_bytes = num_bytes
        self._position = 0

    def read(self, num_bytes: int | None = None) -> bytearray:
        left = max(0, self._num_bytes - self._position)
        data = self._store.read_range(self._key, self._position, left if num_bytes is None else min(num_bytes, left))
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


def _bytes_of(column: Any, value_bytes: int) -> Bits:
    """A column of fixed-size values as uint8 [N, value_bytes], read-only."""
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return np.frombuffer(values.buffers()[1], np.uint8, len(values) * value_bytes, values.offset * value_bytes).reshape(-1, value_bytes)


def _token_rows(table: Any) -> npt.NDArray[Any]:
    rows = np.empty(len(table), TOKEN_ROW)
    for name in TOKEN_ROW.names or ():
        rows[name] = table[name].to_numpy()
    return rows
