"""DeepSpec: a target cache of raw tensors one behind the other, an index of where each sample's lie, and a manifest.

Its `CacheDataset` maps the shards and reads a sample's five tensors by their offsets; `validate_train_cache` holds the manifest's layers,
hidden size and model name against the training configuration. Only bfloat16 is known to it.
"""

import json
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from m2ray.export.consumer import Consumer, Export, Unit
from m2ray.export.dspark import dspark_id, dspark_layers, features_of, last_of
from m2ray.export.output import Output
from m2ray.export.samples import Sample
from m2ray.storage import Data

_RECORD = struct.Struct("<QIIQQQQQ")
"""Of the index: sample, shard, tokens, and the offsets of input_ids, attention_mask, loss_mask and the two kinds of states."""

_STATE_BYTES = 2
_INDEX_PIECE = 1 << 16


def _write(export: Export, output: Output, unit: Unit, samples: Iterator[Sample]) -> None:
    def pieces() -> Iterator[Data]:
        for sample in samples:
            assert sample.loss_mask is not None
            yield sample.token_ids.astype("<i4").data
            yield np.ones(len(sample.token_ids), np.uint8).data
            yield np.ascontiguousarray(sample.loss_mask).data
            yield features_of(sample).data
            yield last_of(export, sample).data

    output.write(_shard(unit.number), pieces())


def _finish(export: Export, output: Output, units: Sequence[Unit]) -> None:
    output.write("samples.idx", _index(export, units))
    manifest = {
        "version": 2,
        "num_samples": len(export.samples),
        "num_shards": len(units),
        "target_layer_ids": list(export.samples.layers[:-1]),
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": _RECORD.size,
        "hidden_size": export.samples.width,
        "shards": [{"shard_id": unit.number, "file_name": _shard(unit.number)} for unit in units],
        "target_model_name_or_path": export.model,
    }
    output.write("manifest.json", [json.dumps(manifest, indent=2, sort_keys=True).encode()])


def _remark(export: Export) -> str:
    return f"Its training configuration has to say target_layer_ids={list(export.samples.layers[:-1])} and target_model_name_or_path={export.model!r}."


def _index(export: Export, units: Sequence[Unit]) -> Iterator[Data]:
    """The records of all samples, some thousand at a time."""
    plane_bytes, num_features = export.samples.width * _STATE_BYTES, len(export.samples.layers) - 1
    records = bytearray()
    for unit in units:
        offset = 0
        for sample, count in enumerate(export.samples.token_counts[unit.start : unit.stop].tolist(), start=unit.start):
            sizes = (4 * count, count, count, count * num_features * plane_bytes, count * plane_bytes)
            offsets = [offset + sum(sizes[:number]) for number in range(len(sizes))]
            records += _RECORD.pack(sample, unit.number, count, *offsets)
            offset += sum(sizes)
            if len(records) >= _INDEX_PIECE:
                yield bytes(records)
                records.clear()
    yield bytes(records)


def _shard(number: int) -> str:
    return f"shard-{number:05d}.bin"


CONSUMER = Consumer(
    name="DeepSpec (cache version 2)",
    default_layers=dspark_layers,
    id_of=dspark_id,
    write=_write,
    finish=_finish,
    remark=_remark,
    needs_mask=True,
    needs_last=True,
    needs_norm=True,
    dtypes=("bfloat16",),
)
