"""SpecForge: a pickle of torch.save for each sample, in folders of 5,000; what its offline trainer (EAGLE-3) walks and reads.

It reads nothing else, so here and for ModelOpt m2ray writes pickles: four tensors, which `torch.load(weights_only=True)` reads. The head is put on
`hidden_state` as it is, so it has to be normed.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np

from m2ray.export.consumer import Consumer, Export, Unit, eagle_layers
from m2ray.export.output import Output
from m2ray.export.samples import Sample

_SAMPLES_A_FOLDER = 5000


def _write(export: Export, output: Output, _unit: Unit, samples: Iterator[Sample]) -> None:
    import torch

    for sample in samples:
        assert sample.loss_mask is not None
        states_TLH = sample.states
        file = io.BytesIO()
        tensors = {
            "input_ids": torch.from_numpy(sample.token_ids.astype(np.int64)),
            "loss_mask": torch.from_numpy(sample.loss_mask.astype(np.int64)),
            "hidden_state": export.normed(sample)[None],
            "aux_hidden_state": states_TLH[:, :-1].flatten(1).clone()[None],  # a view would be saved with all that lies around it
        }
        torch.save(tensors, file)
        output.write(_key(sample.index), [file.getbuffer()])


def _key(index: int) -> str:
    first = index - index % _SAMPLES_A_FOLDER
    return f"rows_{first}-{first + _SAMPLES_A_FOLDER}/data_{index}.ckpt"


def _id_of(layers: Sequence[int], place: int, _num_layers: int) -> str:
    """Its `--aux-hidden-states-layers` count as m2ray does."""
    return "hidden_state" if place == len(layers) - 1 else f"aux {layers[place]}"


CONSUMER = Consumer(
    name="SpecForge 0.2",
    default_layers=eagle_layers,
    id_of=_id_of,
    write=_write,
    needs_mask=True,
    needs_last=True,
    needs_norm=True,
)
