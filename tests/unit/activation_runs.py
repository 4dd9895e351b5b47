"""Small real runs for the tests of m2ray/activations: their jobs, shards, captured bits and parts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, cycle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from m2ray.activations.job import Counts, JobRecord, ModelFacts
from m2ray.activations.reading.pages import PartPages
from m2ray.activations.schema import Compression
from m2ray.activations.writing.commits import Run, claim_run
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt, PartSpec, SequenceFile, Shard
from m2ray.storage import Store

WIDTH = 24
NUM_LAYERS = 12
PARTS = tuple(PartSpec.of("residual", layer, "bfloat16", WIDTH) for layer in (0, 7, 11))
QUARANTINED = {2: "empty", 6: "not a string but int"}
NUM_SEQUENCES = 12
LOADED = {None: "e" * 32, **{layer: f"{layer:032x}" for layer in range(NUM_LAYERS)}}
"""What a chain loads: a digest of each layer."""
SHARD_SEQUENCES = ([0, 4, 5, 9], [1, 3, 11], [7, 8, 10])
# NaNs with payloads of both signs, infinities, zeros of both signs, the smallest and the largest denormals
PATTERNS = np.array([0x7FC1, 0xFFFF, 0x7F81, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x3F80], np.uint16)


def token_count(sequence_id: int) -> int:
    return 3 + (sequence_id * 5) % 11


def row_id(sequence_id: int) -> str:
    return f"row-{sequence_id}"


def token_ids(sequence_id: int) -> np.ndarray:
    return np.random.default_rng([1, sequence_id]).integers(0, 200_000, token_count(sequence_id)).astype(np.int32)


def bits(part: PartSpec, sequence_id: int) -> Bits:
    """What the model would give: random bytes with every odd bit pattern among them, all columns side by side, uint8 [T, bytes of a row]."""
    rng = np.random.default_rng([2, 99 if part.layer is None else part.layer, sequence_id])
    rows = rng.integers(0, 256, (token_count(sequence_id), part.row_bytes), dtype=np.uint8)
    num_patterns = min(len(PATTERNS), rows.shape[1] // 2)
    rows[:, : 2 * num_patterns] = PATTERNS[:num_patterns].view(np.uint8)
    return rows


def shard(index: int) -> Shard:
    sequence_ids = np.array(SHARD_SEQUENCES[index], np.int64)
    return Shard(index, sequence_ids, np.array([token_count(i) for i in sequence_ids.tolist()], np.int32))


def shards() -> list[Shard]:
    return [shard(index) for index in range(len(SHARD_SEQUENCES))]


def micro_batches(of: Shard, size: int = 2) -> list[MicroBatch]:
    """Runs of `size` sequences."""
    batches = []
    for index, start in enumerate(range(0, len(of.sequence_ids), size)):
        sequence_ids, counts = of.sequence_ids[start : start + size], of.token_counts[start : start + size]
        padded = np.zeros((len(counts), counts.max()), np.int32)
        for row, sequence_id in enumerate(sequence_ids.tolist()):
            padded[row, : counts[row]] = token_ids(sequence_id)
        batches.append(MicroBatch(of.index, index, start + size >= len(of.sequence_ids), sequence_ids, counts, padded))
    return batches


def captured(parts: Iterable[PartSpec], micro_batch: MicroBatch) -> list[CapturedLayer]:
    ids = micro_batch.sequence_ids.tolist()
    return [CapturedLayer(part.site, part.layer, by_column(part, np.concatenate([bits(part, i) for i in ids]))) for part in parts]


def by_column(part: PartSpec, rows: Bits) -> tuple[Bits, ...]:
    return tuple(np.split(rows, np.cumsum([column.row_bytes for column in part.columns])[:-1], axis=1))


def loss_mask(sequence_id: int) -> list[int] | None:
    """Some sequences have none."""
    rng = np.random.default_rng([3, sequence_id])
    return None if sequence_id % 4 == 0 else rng.integers(0, 2, token_count(sequence_id)).tolist()


def survey(store: Store, attempt: str = "a0", *, masked: bool = False) -> tuple[SequenceFile, ...]:
    """`sequences/` in two files, with loss masks or as before there were any."""
    shard_of = {i: number for number, ids in enumerate(SHARD_SEQUENCES) for i in ids}
    files = []
    for number, ids in enumerate((range(5), range(5, NUM_SEQUENCES))):
        table = pa.table(
            {
                "sequence_id": pa.array(ids, pa.int64()),
                "row_id": [row_id(i) for i in ids],
                "prompt_digest": [xxhash.xxh3_128_hexdigest(token_ids(i).tobytes()) if i in shard_of else None for i in ids],
                "token_count": pa.array([token_count(i) if i in shard_of else 0 for i in ids], pa.int32()),
                "shard": pa.array([shard_of.get(i) for i in ids], pa.int32()),
                "status": ["ready" if i in shard_of else "quarantined" for i in ids],
                "reason": pa.array([QUARANTINED.get(i) for i in ids], pa.string()),
            }
        )
        if masked:
            masks = [loss_mask(i) if i in shard_of else None for i in ids]
            table = table.append_column("loss_mask", pa.array(masks, pa.list_(pa.uint8())))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        key = f"sequences/sequences-{number:05d}-{attempt}.parquet"
        store.put(key, data)
        files.append(SequenceFile(key, len(table), len(data), xxhash.xxh3_64_hexdigest(data)))
    return tuple(files)


def job(store: Store, parts: Sequence[PartSpec] = PARTS, *, masked: bool = False, **options: object) -> JobRecord:
    return JobRecord.new(
        m2ray_version="0.2.0",
        options={"model": "/models/m", "max_length": None, "layers": "all", "batch_tokens": 16384} | options,
        fingerprints={"model": "aa", "tokenizer": "bb", "template": "cc", "prompts": "dd"},
        model=ModelFacts("minimax_m2", NUM_LAYERS, WIDTH),
        parts=tuple(parts),
        num_shards=len(SHARD_SEQUENCES),
        counts=Counts(NUM_SEQUENCES, NUM_SEQUENCES - len(QUARANTINED), len(QUARANTINED), sum(each.num_tokens for each in shards())),
        sequence_files=survey(store, masked=masked),
        names={"model": "/models/m", "prompts": "prompts.jsonl"},
    )


def writer(
    store: Store, record: JobRecord, *, queue_bytes: int = 1 << 20, threads: int = 2, compression: Compression = "none"
) -> ActivationWriter:
    return ActivationWriter(store, record.run_metadata(), record.parts, queue_bytes=queue_bytes, threads=threads, compression=compression)


def write_shard(store: Store, record: JobRecord, of: Shard, attempt: str, compression: Compression = "none") -> tuple[PartReceipt, ...]:
    """One attempt at a shard through a writer of its own."""
    to_store = writer(store, record, compression=compression)
    try:
        for micro_batch in micro_batches(of):
            to_store.submit(attempt, micro_batch, captured(record.parts, micro_batch), timeout_s=10)
        return to_store.collect(of.index, attempt, timeout_s=10)
    finally:
        to_store.close()


def commit_shard(run: Run, of: Shard, attempt: str, compression: Compression = "none") -> bool:
    receipts = write_shard(run.store, run.job, of, attempt, compression)
    shapes = [(len(each.sequence_ids), each.token_ids_BT.shape[1]) for each in micro_batches(of)]
    return run.commit(of, attempt, receipts, shapes, elapsed_s=1.5)


def attempts() -> Iterator[str]:
    return (f"{number:012x}" for number in count(0xA0))


def finished_run(
    store: Store, parts: Sequence[PartSpec] = PARTS, compressions: Sequence[Compression] = ("none",), *, masked: bool = False
) -> Run:
    """A whole run, finished. Its shards take the compressions in turn."""
    run = claim_run(store, job(store, parts, masked=masked))
    hold_weights(store, run.job, LOADED)
    for of, attempt, compression in zip(shards(), attempts(), cycle(compressions), strict=False):
        assert commit_shard(run, of, attempt, compression)
    run.finish()
    return run


def span(pages: PartPages, start: int, stop: int, row_bytes: int) -> Bits:
    """The rows [start, stop) of a part: uint8 [N, W * itemsize]."""
    rows = np.empty((stop - start, row_bytes), np.uint8)
    pages.take(np.arange(start, stop), rows, np.arange(stop - start))
    return rows
