"""What `m2ray bench` measures besides the GPU: the encoder of one writer thread, and the store. Both by the writer of a run."""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from isal.isal_zlib import crc32

from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt, PartSpec
from m2ray.errors import StoreError
from m2ray.parquet.crcs import Crcs
from m2ray.sites import parts_of_run
from m2ray.storage import Store
from m2ray.storage.store import Data, PartSink

_ENCODE_S = 1.5
_MICRO_BATCH_BYTES = 64 << 20
"""Of one layer's rows."""
_LENGTH = 512
_QUEUE_BYTES = 2 << 30
_STORE_S = 2.0
_STORE_LAYERS = 8
_STORE_ROUNDS = ((2 << 20, 1, 1), (16 << 20, 1, 1), (_MICRO_BATCH_BYTES, 2, 1), (_MICRO_BATCH_BYTES, 2, 8))
"""Bytes of one layer's rows of a micro-batch, micro-batches of a shard, shards: 16 MiB, 128 MiB, 1 GiB and 8 GiB with all layers."""
_TIMEOUT_S = 120.0


def encode_bytes_per_s(hidden_size: int, store_dtype: str, *, with_crcs: bool = False) -> float:
    """Activations that one writer thread turns into Parquet a second, checksums and all, stored nowhere. `with_crcs`: rows come with their CRC32s."""
    rows, specs = _rows(hidden_size, store_dtype, _MICRO_BATCH_BYTES), parts_of_run({"residual": (0,)}, store_dtype, hidden_size)
    crcs = _crcs(rows) if with_crcs else ()
    writer = ActivationWriter(DiscardingStore(), {}, specs, queue_bytes=2 * rows.nbytes, threads=1)
    try:
        shards = 0
        began = time.monotonic()
        while time.monotonic() - began < _ENCODE_S or not shards:
            _submit(writer, specs, (rows, crcs), shards, 1)
            writer.collect(shards, "bench", _TIMEOUT_S)
            shards += 1
        return shards * rows.nbytes / (time.monotonic() - began)
    finally:
        writer.close()


def store_bytes_per_s(store: Store, hidden_size: int, store_dtype: str, threads: int, *, with_crcs: bool = False) -> float:
    """What a run's writer with `threads` threads gets into the store a second, if rows are always there, all of it durable at the end.

    Sizes grow until a round takes two seconds: a slow store is not sent gigabytes, a fast one is not judged by what caches take.
    Deletes what it wrote. `with_crcs`: rows come with their CRC32s.

    Raises:
        StoreError: it cannot be written.
    """
    beside, specs = (
        _RenamingStore(store, f"_bench-{uuid.uuid4().hex}"),
        parts_of_run({"residual": tuple(range(_STORE_LAYERS))}, store_dtype, hidden_size),
    )
    rate = 0.0
    for micro_batch_bytes, micro_batches, shards in _STORE_ROUNDS:
        rows = _rows(hidden_size, store_dtype, micro_batch_bytes)
        crcs = _crcs(rows) if with_crcs else ()
        writer = ActivationWriter(beside, {}, specs, queue_bytes=_QUEUE_BYTES, threads=threads)
        receipts: list[PartReceipt] = []
        began = time.monotonic()
        try:
            for shard in range(shards):
                _submit(writer, specs, (rows, crcs), shard, micro_batches)
            for shard in range(shards):
                receipts += writer.collect(shard, "bench", _TIMEOUT_S)
            seconds = time.monotonic() - began
        finally:
            try:
                writer.close()
            finally:
                beside.delete(receipt.key for receipt in receipts)
        rate = sum(receipt.num_bytes for receipt in receipts) / seconds
        if seconds > _STORE_S:
            break
    return rate


def _rows(hidden_size: int, store_dtype: str, num_bytes: int) -> Bits:
    """About `num_bytes` of rows, of whole sequences."""
    itemsize_bytes = 4 if store_dtype == "float32" else 2
    sequences = max(1, num_bytes // (_LENGTH * hidden_size * itemsize_bytes))
    return _gaussian_bits(sequences * _LENGTH, hidden_size, itemsize_bytes)


def _crcs(rows: Bits) -> tuple[Crcs]:
    """The CRC32 of each row, of its one column, as a GPU makes them."""
    return (np.array([crc32(row) for row in rows], np.uint32),)


def _submit(
    writer: ActivationWriter, specs: Sequence[PartSpec], values: tuple[Bits, tuple[Crcs, ...]], shard: int, micro_batches: int
) -> None:
    """A whole shard, each layer of each micro-batch the same rows, with their CRC32s or without."""
    rows, crcs = values
    sequences = len(rows) // _LENGTH
    counts = np.full(sequences, _LENGTH, np.int32)
    token_ids_BT = np.random.default_rng(0).integers(0, 100_000, (sequences, _LENGTH), dtype=np.int32)
    captured = [CapturedLayer(spec.site, spec.layer, (rows,), crcs=crcs) for spec in specs]
    for index in range(micro_batches):
        ids = np.arange(sequences) + index * sequences
        batch = MicroBatch(shard, index, index == micro_batches - 1, ids, counts, token_ids_BT)
        writer.submit("bench", batch, captured, _TIMEOUT_S)


def _gaussian_bits(rows: int, hidden_size: int, itemsize_bytes: int) -> Bits:
    """Bits of normal numbers, uint8 [N, H * itemsize]; two-byte ones are bfloat16's."""
    values = np.random.default_rng(0).standard_normal((rows, hidden_size), dtype=np.float32)
    bits = values.view(np.uint32)
    return np.ascontiguousarray(bits if itemsize_bytes == 4 else (bits >> 16).astype(np.uint16)).view(np.uint8)


class DiscardingStore(Store):
    """Takes parts and keeps nothing."""

    url = "nowhere"

    def size(self, key: str) -> int | None:
        return None

    def version(self, key: str) -> str:
        raise StoreError(f"{key} was not kept.")

    def read(self, key: str) -> bytes:
        raise StoreError(f"{key} was not kept.")

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        raise StoreError(f"{key} was not kept.")

    def list(self, prefix: str, depth: int | None = None) -> Iterator[tuple[str, int]]:
        return iter(())

    def create(self, key: str, data: Data) -> None:
        pass

    def put(self, key: str, data: Data) -> None:
        pass

    def open_part(self, key: str) -> PartSink:
        return _DiscardingSink()

    def delete(self, keys: Iterable[str]) -> None:
        pass


class _RenamingStore(DiscardingStore):
    """Keeps parts in a store under other names, which no reader of a run there takes for its own."""

    def __init__(self, store: Store, mark: str) -> None:
        self._store = store
        self._mark = mark

    def open_part(self, key: str) -> PartSink:
        return self._store.open_part(self._named(key))

    def delete(self, keys: Iterable[str]) -> None:
        self._store.delete(map(self._named, keys))

    def _named(self, key: str) -> str:
        return f"{self._mark}-{key.replace('/', '-')}"


class _DiscardingSink(PartSink):
    def write(self, data: Data) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
