"""A safetensors file as pieces to be written one behind the other, so that tensors go out from where they lie.

Eight bytes, the header's length; the header, JSON that names dtype, shape and place of each tensor; the tensors' bytes.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.storage import Data

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8"}
_ALIGNED_BYTES = 8

Tensor = tuple[str, Sequence[int], npt.NDArray[Any]]
"""Dtype by torch's name, shape, and a contiguous array of the tensor's bytes."""


def pieces_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Data]:
    """The pieces of the file that holds these tensors.

    Give those of the widest dtype first: then each begins where its dtype wants it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start, pieces = 0, []
    for name, (dtype, shape, values) in tensors.items():
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + len(data)]}
        start += len(data)
        pieces.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED_BYTES)
    return [len(text).to_bytes(8, "little") + text, *pieces]
