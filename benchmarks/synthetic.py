"""A run of made-up activations in the real layout: layers as wide as MiniMax-M2's, one by default, for benchmarks of reading."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from m2ray.activations.job import Counts, JobRecord, ModelFacts
from m2ray.activations.schema import Compression
from m2ray.activations.writing.commits import claim_run
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartSpec, SequenceFile, Shard
from m2ray.storage import Store, open_store

HIDDEN_SIZE = 3072
LAYER = 30
_SEQUENCES, _LENGTH, _MICRO_BATCHES = 32, 512, 2


def activations(seed: int) -> Bits:
    """bfloat16 bits of Gaussian numbers on channels of different scale, a few of them outliers: uint8 [N, 2 * H]."""
    rng, channels = np.random.default_rng(seed), np.random.default_rng(0)
    scales = np.exp(channels.standard_normal(HIDDEN_SIZE, dtype=np.float32))
    scales[channels.integers(0, HIDDEN_SIZE, 8)] *= 100
    values = rng.standard_normal((_SEQUENCES * _LENGTH, HIDDEN_SIZE), dtype=np.float32) * scales
    return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)


def make_run(
    folder: str | Path, num_shards: int, compression: Compression = "none", layers: Sequence[int] = (LAYER,), *, with_masks: bool = False
) -> None:
    """A finished run of `num_shards` shards of 32,768 rows, 201 MB each a layer without compression."""
    store = open_store(folder)
    specs = tuple(PartSpec.of("residual", layer, "bfloat16", HIDDEN_SIZE) for layer in layers)
    num_sequences = _SEQUENCES * _MICRO_BATCHES
    job = JobRecord.new(
        m2ray_version="benchmark",
        options={},
        fingerprints={"model": "-", "tokenizer": "-"},
        model=ModelFacts("minimax_m2", 62, HIDDEN_SIZE),
        parts=specs,
        num_shards=num_shards,
        counts=Counts(num_shards * num_sequences, num_shards * num_sequences, 0, num_shards * num_sequences * _LENGTH),
        sequence_files=(_sequences(store, num_shards, num_sequences, with_masks=with_masks),),
        names={"model": "-", "prompts": "-"},
    )
    run = claim_run(store, job)
    writer = ActivationWriter(store, job.run_metadata(), specs, queue_bytes=1 << 30, threads=1, compression=compression)
    counts = np.full(_SEQUENCES, _LENGTH, np.int32)
    for number in range(num_shards):
        ids = np.arange(num_sequences, dtype=np.int64) + number * num_sequences
        token_ids_BT = np.random.default_rng(number).integers(0, 200_000, (num_sequences, _LENGTH), dtype=np.int32)
        for index in range(_MICRO_BATCHES):
            of = slice(index * _SEQUENCES, (index + 1) * _SEQUENCES)
            micro_batch = MicroBatch(number, index, index == _MICRO_BATCHES - 1, ids[of], counts, token_ids_BT[of])
            rows = activations(number * _MICRO_BATCHES + index)
            writer.submit("a1", micro_batch, [CapturedLayer("residual", layer, (rows,)) for layer in layers], 600)
        shard = Shard(number, ids, np.full(num_sequences, _LENGTH, np.int32))
        run.commit(shard, "a1", writer.collect(number, "a1", 600), [(_SEQUENCES, _LENGTH)] * _MICRO_BATCHES, 1.0)
    writer.close()
    run.finish()


def _sequences(store: Store, num_shards: int, per_shard: int, *, with_masks: bool) -> SequenceFile:
    count = num_shards * per_shard
    table = pa.table(
        {
            "sequence_id": np.arange(count, dtype=np.int64),
            "row_id": [str(number) for number in range(count)],
            "prompt_digest": ["0" * 32] * count,
            "token_count": np.full(count, _LENGTH, np.int32),
            "shard": (np.arange(count) // per_shard).astype(np.int32),
            "status": ["ready"] * count,
            "reason": pa.nulls(count, pa.string()),
        }
    )
    if with_masks:
        offsets = np.arange(count + 1, dtype=np.int32) * _LENGTH
        masks = pa.ListArray.from_arrays(offsets, pa.array(np.ones(count * _LENGTH, np.uint8)))
        table = table.append_column("loss_mask", masks)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    key = "sequences/sequences-00000-a1.parquet"
    store.put(key, data)
    return SequenceFile(key, count, len(data), xxhash.xxh3_64_hexdigest(data))
