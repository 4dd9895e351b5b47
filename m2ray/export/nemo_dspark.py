"""NeMo Automodel's DSpark: shards of equally many samples padded to one length, a manifest, and the target's embedding and head.

Its `CachedDSparkDataset` finds sample i in shard i // shard_size, and wants exactly the shards that the manifest's number of samples makes;
training reads `target_weights.safetensors` instead of the target model.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m2ray.export.consumer import Consumer, Export, Unit
from m2ray.export.dspark import dspark_id, dspark_layers, features_of, last_of
from m2ray.export.output import Output
from m2ray.export.safetensors_file import Tensor, header_of, pieces_of
from m2ray.export.samples import Sample
from m2ray.storage import Data

_SHARD_BYTES, _MOST_SAMPLES = 64 << 20, 256
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _shard_size(export: Export) -> int:
    """Samples of a shard, which is in memory as a whole."""
    return min(_MOST_SAMPLES, max(1, _SHARD_BYTES // (_seq_length(export) * export.samples.token_bytes)))


def _seq_length(export: Export) -> int:
    """What every sample is padded to: the longest one."""
    return int(export.samples.token_counts.max())


def _unit_ends(export: Export) -> list[int]:
    num_samples, size = len(export.samples), _shard_size(export)
    return [*range(size, num_samples, size), num_samples]


def _write(export: Export, output: Output, unit: Unit, samples: Iterator[Sample]) -> None:
    shape_NS = unit.stop - unit.start, _seq_length(export)
    width, num_features = export.samples.width, len(export.samples.layers) - 1
    state_bytes = export.samples.token_bytes // (num_features + 1)
    features = np.zeros((*shape_NS, num_features * state_bytes), np.uint8)
    last = np.zeros((*shape_NS, state_bytes), np.uint8)
    input_ids, loss_mask = np.zeros((2, *shape_NS), np.int64)
    for row, sample in enumerate(samples):
        assert sample.loss_mask is not None
        count = len(sample.token_ids)
        input_ids[row, :count], loss_mask[row, :count] = sample.token_ids, sample.loss_mask
        features[row, :count], last[row, :count] = features_of(sample), last_of(export, sample)
    dtype = export.samples.dtype
    tensors: dict[str, Tensor] = {
        "input_ids": ("int64", shape_NS, input_ids),
        "loss_mask": ("int64", shape_NS, loss_mask),
        "target_hidden_states": (dtype, (*shape_NS, num_features * width), features),
        "target_last_hidden_states": (dtype, (*shape_NS, width), last),
    }
    output.write(f"shard-{unit.number:06d}.safetensors", pieces_of(tensors))


def _finish(export: Export, output: Output, _units: Sequence[Unit]) -> None:
    output.write("target_weights.safetensors", _weights(export))
    output.write("manifest.json", [json.dumps(_manifest(export), indent=2, sort_keys=True).encode()])


def _remark(export: Export) -> str:
    layers = list(export.samples.layers[:-1])
    return (
        f"Its recipe_args have to say target_layer_ids: {layers} and seq_length: {_seq_length(export)}; a CPU trains on float32 rows alone."
    )


def _weights(export: Export) -> Iterator[Data]:
    """Embedding and head in the states' dtype, read and written some MiB at a time."""
    import torch

    assert export.target is not None
    dtype = export.samples.dtype
    named = {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    yield header_of({name: (dtype, export.target.shapes[of]) for name, of in named.items()})
    for of in named.values():
        for piece in export.target.pieces(of, getattr(torch, dtype)):
            yield piece.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _manifest(export: Export) -> dict[str, Any]:
    assert export.target is not None
    width, layers = export.samples.width, export.samples.layers[:-1]
    return {
        "format_version": 1,
        "complete": True,
        "target_model": export.model,
        "target_model_type": export.target.model_type,
        "target_vocab_size": export.target.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": export.num_layers,
        "seq_length": _seq_length(export),
        "dtype": _DTYPES[export.samples.dtype],
        "num_samples": len(export.samples),
        "shard_size": _shard_size(export),
        "target_hidden_dim": width * len(layers),
        "target_last_hidden_dim": width,
        "target_layer_ids": list(layers),
    }


CONSUMER = Consumer(
    name="nemo-automodel 0.7",
    default_layers=dspark_layers,
    id_of=dspark_id,
    write=_write,
    finish=_finish,
    remark=_remark,
    unit_ends=_unit_ends,
    needs_mask=True,
    needs_last=True,
    needs_norm=True,
    needs_model=True,
)
