"""speculators: a saved data set of tokens and masks, and beside it a safetensors file of hidden states for each of its rows.

Its trainer reads row i of the data set and `hidden_states/hs_{i}.safetensors` (`ArrowDataset`, `--on-missing raise`), and passes over
rows whose token ids are not the same in both. The last plane is the last layer's output before the final norm, which it applies itself.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from m2ray.export.consumer import Consumer, Export, Unit, eagle_layers
from m2ray.export.output import Output
from m2ray.export.safetensors_file import Tensor, pieces_of
from m2ray.export.samples import Sample
from m2ray.export.saved_dataset import data_file, lists, stream_of, value, values, write_description

FEATURES = {"input_ids": values("int64"), "loss_mask": values("int64"), "seq_len": value("int64"), "sequence_id": value("int64")}


def _write(export: Export, output: Output, unit: Unit, samples: Iterator[Sample]) -> None:
    token_ids, masks, sequence_ids = [], [], []
    for sample in samples:
        ids = sample.token_ids.astype(np.int64)
        tensors: dict[str, Tensor] = {
            "token_ids": ("int64", ids.shape, ids),
            "hidden_states": (sample.dtype, (len(ids), len(export.samples.layers), export.samples.width), sample.bits),
        }
        output.write(f"hidden_states/hs_{sample.index}.safetensors", pieces_of(tensors))
        assert sample.loss_mask is not None
        token_ids.append(ids)
        masks.append(sample.loss_mask.copy())
        sequence_ids.append(sample.sequence_id)
    columns = {
        "input_ids": lists(token_ids, "int64"),
        "loss_mask": lists(masks, "int64"),
        "seq_len": pa.array(list(map(len, token_ids)), pa.int64()),
        "sequence_id": pa.array(sequence_ids, pa.int64()),
    }
    output.write(data_file(unit.number, unit.count), stream_of(FEATURES, [columns]))


def _finish(export: Export, output: Output, units: Sequence[Unit]) -> None:
    names = [data_file(unit.number, unit.count) for unit in units]
    write_description(output, FEATURES, names, export.run_id, "torch")


def _id_of(layers: Sequence[int], place: int, _num_layers: int) -> str:
    """Its ids count the outputs from the embedding's on: id k is "after layer k - 1"."""
    return str(layers[place] + 1)


CONSUMER = Consumer(
    name="speculators 0.9",
    default_layers=eagle_layers,
    id_of=_id_of,
    write=_write,
    finish=_finish,
    needs_mask=True,
    needs_last=True,
)
