"""What `m2ray bench` measures besides the GPU: the encoder of one writer thread, and the store."""

import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2ray.activations.writer import ActivationWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartSpec
from m2ray.errors import StoreError
from m2ray.storage import Store
from m2ray.storage.store import Data, PartSink

_ENCODE_S = 1.5
_ENCODE_BYTES = 64 << 20
_STORE_S = 2.0
_STORE_THREADS = 4
_STORE_FIRST_BYTES, _STORE_MOST_BYTES = 4 << 20, 1 << 30
_PIECE_BYTES = 16 << 20
_TIMEOUT_S = 120.0


def encode_bytes_per_s(hidden_size: int, store_dtype: str) -> float:
    """Activations that one writer thread turns into Parquet a second, checksums and all, stored nowhere."""
    itemsize_bytes = 4 if store_dtype == "float32" else 2
    length = 512
    sequences = max(1, _ENCODE_BYTES // (length * hidden_size * itemsize_bytes))
    rows = _gaussian_bits(sequences * length, hidden_size, itemsize_bytes)
    part = PartSpec("residual", 0, store_dtype, hidden_size)
    token_ids_BT = np.random.default_rng(0).integers(0, 100_000, (sequences, length), dtype=np.int32)
    counts = np.full(sequences, length, np.int32)
    writer = ActivationWriter(_Nowhere(), {}, [part], queue_bytes=2 * rows.nbytes, threads=1)
    try:
        shards = 0
        began = time.monotonic()
        while time.monotonic() - began < _ENCODE_S or not shards:
            batch = MicroBatch(shards, 0, True, np.arange(sequences), counts, token_ids_BT)
            writer.submit("bench", batch, [CapturedLayer("residual", 0, rows)], _TIMEOUT_S)
            writer.collect(shards, "bench", _TIMEOUT_S)
            shards += 1
        return shards * rows.nbytes / (time.monotonic() - began)
    finally:
        writer.close()


def store_bytes_per_s(store: Store) -> float:
    """What the store takes from several parts at once, every one durable at the end. Deletes what it wrote.

    Sizes grow until a round takes two seconds: a slow store is not sent a gigabyte, a fast one is not judged by what caches take.

    Raises:
        StoreError: it cannot be written.
    """
    piece = np.random.default_rng(0).bytes(_PIECE_BYTES)
    num_bytes = _STORE_FIRST_BYTES
    while True:
        keys = [f"_bench-{uuid.uuid4().hex}" for _ in range(_STORE_THREADS)]
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(_STORE_THREADS) as pool:
                list(pool.map(lambda key: _write(store, key, piece, num_bytes), keys))  # noqa: B023 - awaited within the loop
            seconds = time.monotonic() - began
        finally:
            store.delete(keys)
        if seconds > _STORE_S or num_bytes >= _STORE_MOST_BYTES:
            return _STORE_THREADS * num_bytes / seconds
        num_bytes *= 4


def _write(store: Store, key: str, piece: bytes, num_bytes: int) -> None:
    sink = store.open_part(key)
    try:
        left = num_bytes
        while left:
            sink.write(memoryview(piece)[: min(left, len(piece))])
            left -= min(left, len(piece))
        sink.close()
    except StoreError:
        sink.abort()
        raise


def _gaussian_bits(rows: int, hidden_size: int, itemsize_bytes: int) -> Bits:
    """Bits of normal numbers, uint8 [N, H * itemsize]; two-byte ones are bfloat16's."""
    values = np.random.default_rng(0).standard_normal((rows, hidden_size), dtype=np.float32)
    bits = values.view(np.uint32)
    return np.ascontiguousarray(bits if itemsize_bytes == 4 else (bits >> 16).astype(np.uint16)).view(np.uint8)


class _Nowhere(Store):
    """Takes parts and keeps nothing."""

    url = "nowhere"

    def size(self, key: str) -> int | None:
        return None

    def read(self, key: str) -> bytes:
        raise StoreError(f"{key} was not kept.")

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        raise StoreError(f"{key} was not kept.")

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(())

    def create(self, key: str, data: Data) -> None:
        pass

    def put(self, key: str, data: Data) -> None:
        pass

    def open_part(self, key: str) -> PartSink:
        return _NoSink()

    def delete(self, keys: Iterable[str]) -> None:
        pass


class _NoSink(PartSink):
    def write(self, data: Data) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
