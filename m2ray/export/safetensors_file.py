"""A safetensors file as pieces to be written one behind the other, so that tensors go out from where they lie.

Eight bytes, the header's length; the header, JSON that names dtype, shape and place of each tensor; the tensors' bytes.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.storage import Data

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8"}
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int64": 8, "int32": 4, "uint8": 1}
_ALIGNED_BYTES = 8

Tensor = tuple[str, Sequence[int], npt.NDArray[Any]]
"""Dtype by torch's name, shape, and a contiguous array of the tensor's bytes."""


def pieces_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Data]:
    """The pieces of the file that holds these tensors.

    Give those of the widest dtype first: then each begins where its dtype wants it.
    """
    header = header_of({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    return [header, *(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data for _, _, values in tensors.values())]


def header_of(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> Data:
    """What comes before the bytes of tensors that are given by dtype and shape, in their order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED_BYTES)
    return len(text).to_bytes(8, "little") + text
