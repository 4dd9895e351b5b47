"""What the two trainers of DSpark read alike: some layers' states side by side, and the model's last state behind its final norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2ray.batches import Bits
from m2ray.export.consumer import Export
from m2ray.export.samples import Sample

_FEATURES = 5


def dspark_layers(num_layers: int, _of_run: Sequence[int]) -> list[int]:
    """Five layers spread from the second to the last but two, as in the configurations that are published, and the last one."""
    first, last = 1, max(num_layers - 3, 1)
    return [*sorted({round(first + place * (last - first) / (_FEATURES - 1)) for place in range(_FEATURES)}), num_layers - 1]


def dspark_id(layers: Sequence[int], place: int, _num_layers: int) -> str:
    """Both number layers as m2ray does; the last state is no feature."""
    return str(layers[place]) if place < len(layers) - 1 else "target_last_hidden_states"


def features_of(sample: Sample) -> Bits:
    """`target_hidden_states`: all planes but the last side by side, uint8 [T, k * W * itemsize]."""
    return np.ascontiguousarray(sample.bits[:, :-1]).reshape(len(sample.bits), -1)


def last_of(export: Export, sample: Sample) -> Bits:
    """`target_last_hidden_states`: the last plane behind the final norm, uint8 [T, W * itemsize]."""
    import torch

    normed: Any = export.normed(sample).contiguous().view(torch.uint8).numpy()
    return np.asarray(normed)
