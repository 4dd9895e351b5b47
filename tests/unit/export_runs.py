"""Runs with loss masks, for the tests of m2ray/export: those of activation_runs, whose `sequences/` has one column more."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from m2ray.activations.writing.commits import Run, claim_run
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.batches import PartSpec, SequenceFile
from m2ray.storage import Store
from tests.unit import activation_runs as runs

LAYERS = (1, 5, 8, 11)
"""What EAGLE-3 takes of a model of twelve layers, and the last one."""

ORDER = [number for ids in runs.SHARD_SEQUENCES for number in ids]
"""The sequences in the order of an export."""


def parts(layers: Sequence[int] = LAYERS, dtype: str = "bfloat16") -> list[PartSpec]:
    return [PartSpec.of("residual", layer, dtype, runs.WIDTH) for layer in layers]


def mask(sequence_id: int) -> np.ndarray:
    """uint8 [T]; the first token is never learnt."""
    drawn = np.random.default_rng([3, sequence_id]).integers(0, 2, runs.token_count(sequence_id)).astype(np.uint8)
    drawn[0] = 0
    return drawn


def finished_run(store: Store, of: Sequence[PartSpec], without_mask: Sequence[int] = ()) -> Run:
    """A finished run of these parts, in which all but these sequences have a loss mask."""
    record = runs.job(store, of, compute_dtype="float8")
    files = tuple(_with_masks(store, file, without_mask) for file in record.sequence_files)
    run = claim_run(store, replace(record, sequence_files=files))
    hold_weights(store, run.job, runs.LOADED)
    for shard, attempt in zip(runs.shards(), runs.attempts(), strict=False):
        assert runs.commit_shard(run, shard, attempt)
    run.finish()
    return run


def states(sequence_id: int, layers: Sequence[int] = LAYERS, dtype: str = "bfloat16") -> np.ndarray:
    """What an export has to hold of a sequence: uint8 [T, L, W * itemsize]."""
    return np.stack([runs.bits(part, sequence_id) for part in parts(layers, dtype)], axis=1)


def _with_masks(store: Store, file: SequenceFile, without_mask: Sequence[int]) -> SequenceFile:
    table = pq.read_table(pa.BufferReader(store.read(file.key)))
    masks = [
        mask(row["sequence_id"]).tolist() if row["status"] == "ready" and row["sequence_id"] not in without_mask else None
        for row in table.to_pylist()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(table.append_column("loss_mask", pa.array(masks, pa.list_(pa.uint8()))), sink)
    data = sink.getvalue().to_pybytes()
    store.put(file.key, data)
    return replace(file, num_bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data))
