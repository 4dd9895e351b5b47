"""SAELens: a saved data set whose rows are contexts of one length, a column for each layer, named as TransformerLens names its hook.

Its `ActivationsStore` reads it as `cached_activations_path`. A sequence is cut from its beginning into whole contexts; the rest, shorter than
one, is left out. SAELens itself takes the first context of a sequence (`disable_concat_sequences`); those that follow saw what is before them.
Array2D has no bfloat16: such rows become float32, which holds the same numbers.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from m2ray.errors import ConfigError
from m2ray.export.consumer import Consumer, Export, Unit, units_by_shard
from m2ray.export.output import Output
from m2ray.export.samples import Sample
from m2ray.export.saved_dataset import Feature, data_file, matrices, matrix, stream_of, values, write_description

_BATCH_BYTES = 32 << 20


def _dtype(export: Export) -> str:
    return "float16" if export.samples.dtype == "float16" else "float32"


def _hooks(export: Export) -> list[str]:
    layers = export.samples.layers
    return [_id_of(layers, place, export.num_layers) for place in range(len(layers))]


def _features(export: Export) -> dict[str, Feature]:
    length = _context_size(export)
    hooks = {hook: matrix(_dtype(export), (length, export.samples.width)) for hook in _hooks(export)}
    return {**hooks, "token_ids": values("int32", length)}


def _write(export: Export, output: Output, unit: Unit, samples: Iterator[Sample]) -> None:
    output.write(data_file(unit.number, unit.count), stream_of(_features(export), _batches(export, samples)))


def _batches(export: Export, samples: Iterator[Sample]) -> Iterator[dict[str, Any]]:
    """Record batches of some 32 MiB: of each layer its contexts as matrices, and their token ids."""
    columns: dict[str, list[Any]] = {name: [] for name in _features(export)}
    num_bytes = 0
    for contexts in chain.from_iterable(_contexts(export, sample) for sample in samples):
        for name, array in contexts.items():
            columns[name].append(array)
            num_bytes += array.nbytes
        if num_bytes >= _BATCH_BYTES:
            yield _batch(columns)
            columns, num_bytes = {name: [] for name in columns}, 0
    if num_bytes:
        yield _batch(columns)


def _contexts(export: Export, sample: Sample) -> Iterator[dict[str, Any]]:
    """The whole contexts of a sequence, some at a time, since Arrow counts a batch's numbers in 32 bits.

    Of each layer [C, context_size, W], and the token ids [C, context_size]; none if the sequence is too short.
    """
    import torch

    length, dtype = _context_size(export), getattr(torch, _dtype(export))
    stop = len(sample.token_ids) // length * length
    step = length * max(1, _BATCH_BYTES // (length * export.samples.token_bytes))
    for start in range(0, stop, step):
        some = slice(start, min(start + step, stop))
        states_TLW = sample.states[some]
        hooks = {
            hook: states_TLW[:, place].to(dtype, copy=True).contiguous().view(-1, length, export.samples.width).numpy()
            for place, hook in enumerate(_hooks(export))
        }
        yield {**hooks, "token_ids": sample.token_ids[some].reshape(-1, length).copy()}


def _batch(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The columns of a record batch, from the contexts of its sequences."""
    whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    token_ids = whole.pop("token_ids")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(token_ids.reshape(-1)), token_ids.shape[1])
    return {**{hook: matrices(numbers) for hook, numbers in whole.items()}, "token_ids": lists}


def _finish(export: Export, output: Output, units: Sequence[Unit]) -> None:
    names = [data_file(unit.number, unit.count) for unit in units]
    write_description(output, _features(export), names, export.run_id, None)


def _unit_ends(export: Export) -> list[int]:
    longest = int(export.samples.token_counts.max())
    if longest < _context_size(export):
        raise ConfigError(
            f"The run's longest sequence has {longest} tokens, which fill no context of {export.context_size}.",
            "Give a smaller --context-size.",
        )
    return units_by_shard(export)


def _remark(export: Export) -> str:
    length, counts = _context_size(export), export.samples.token_counts
    return (
        f"{(counts // length).sum():,} contexts of {length} tokens; {(counts % length).sum():,} tokens at the ends of sequences, "
        "which fill no context, are left out"
    )


def _context_size(export: Export) -> int:
    assert export.context_size is not None
    return export.context_size


def _only_layer(_num_layers: int, of_run: Sequence[int]) -> list[int]:
    """A dictionary is trained on one layer: the run's, where it has no other."""
    return list(of_run) if len(of_run) == 1 else []


def _id_of(layers: Sequence[int], place: int, _num_layers: int) -> str:
    return f"blocks.{layers[place]}.hook_resid_post"


CONSUMER = Consumer(
    name="SAELens 6.54",
    default_layers=_only_layer,
    id_of=_id_of,
    write=_write,
    finish=_finish,
    unit_ends=_unit_ends,
    remark=_remark,
    needs_context_size=True,
)
