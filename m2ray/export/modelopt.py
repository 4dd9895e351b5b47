"""NVIDIA ModelOpt: a file of torch.save for each sample, which `OfflineSupervisedDataset` loads with `weights_only=True`.

The last state is written as it is recorded, before the final norm, and `hidden_states_prenorm` says so: ModelOpt then puts the model's
own norm on it before the head.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m2ray.export.consumer import Consumer, Export, Unit, eagle_layers
from m2ray.export.output import Output
from m2ray.export.samples import Sample


def _write(_export: Export, output: Output, _unit: Unit, samples: Iterator[Sample]) -> None:
    import torch

    for sample in samples:
        states_TLW = sample.states
        content: dict[str, Any] = {
            "input_ids": torch.from_numpy(sample.token_ids.astype(np.int64)),
            "hidden_states": states_TLW[:, -1].clone(),  # a view would be saved with all that lies around it
            "aux_hidden_states": states_TLW[:, :-1].flatten(1).clone(),
            "hidden_states_prenorm": True,
            "conversation_id": sample.row_id,
        }
        if sample.loss_mask is not None:
            content["loss_mask"] = torch.from_numpy(sample.loss_mask.astype(np.int64))
        saved = io.BytesIO()
        torch.save(content, saved)
        output.write(f"{sample.index:08d}.pt", [saved.getbuffer()])


def _remark(export: Export) -> str:
    layers = list(export.samples.layers[:-1])
    return f"Its eagle_aux_hidden_state_layer_ids (dflash: target layers) have to be {layers}."


def _id_of(layers: Sequence[int], place: int, _num_layers: int) -> str:
    """Its `eagle_aux_hidden_state_layer_ids` are m2ray's numbers."""
    return str(layers[place]) if place < len(layers) - 1 else "hidden_states"


CONSUMER = Consumer(
    name="nvidia-modelopt 0.47",
    default_layers=eagle_layers,
    id_of=_id_of,
    write=_write,
    remark=_remark,
    needs_last=True,
)
