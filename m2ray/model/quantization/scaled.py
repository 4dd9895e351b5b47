"""FP8 and 8-bit integers with a scale for each block of values: of all of a tensor, a row, a block of rows and columns, or 32 values of a row.

`(values.float() * scale.float()).to(bfloat16)` (scaling.py). References: transformers 5.24, integrations/finegrained_fp8.py (Fp8Dequantize)
for `fp8` and `mxfp8`; compressed-tensors 0.20, quantization/lifecycle (dequantize), which multiplies in the scale's dtype: the same bits but for
float16 (`in_scale_dtype`); nvidia-modelopt 0.47, FP8QTensor.dequantize(torch.float32) and MXFP8QTensor.dequantize. Scales of 8 bits are
exponents of two, less 127: float8_e8m0fnu, or the same as uint8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch

from m2ray.errors import CheckpointError
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.scaling import Block, ScaledUnpack
from m2ray.model.quantization.stored import MISMATCH, Part, Shape, StoredTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENT_SCALES = (torch.float8_e8m0fnu, torch.uint8)

ROW = (1, 0)
"""Of all a row's columns one scale."""


@dataclass(frozen=True)
class Scaled:
    """The method of 8-bit values with scales.

    Attributes:
        dtypes: of values.
        blocks: what may share a scale: one for all (None), ROW, or rows and columns. Which of them does, its scale's shape tells.
        scale_endings: under which scales are published.
        scale_dtypes: those that the configuration's format has.
        in_scale_dtype: products are rounded to the scale's dtype before they are to bfloat16.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    blocks: tuple[Block, ...]
    scale_endings: tuple[str, ...]
    scale_dtypes: tuple[torch.dtype, ...] = FLOAT_SCALES
    in_scale_dtype: bool = False

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"values": ("",), "scale": self.scale_endings}

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype in self.dtypes

    def store(self, key: str, found: Mapping[str, tuple[str, TensorHeader]]) -> StoredTensor:
        header = found["values"][1]
        values = Part("values", *found["values"], rows=1 if header.shape else 0)
        stored = StoredTensor(key, header.shape, (values,), ScaledUnpack(None), method=self.name)
        if "scale" not in found:
            kind = "FP8" if header.dtype in FP8 else "int8"
            lacking = CheckpointError(f"{key} is {kind}, but its scales {key}{self.scale_endings[0]} are missing.", MISMATCH)
            return stored._replace(problems=(lacking,))
        scale_key, scale = found["scale"]
        fitting = _fitting(self.blocks, header.shape, scale.shape)
        if not fitting or scale.dtype not in self.scale_dtypes:
            needed = " or ".join(dict.fromkeys(str(list(shapes[0])) for _, shapes in _candidates(self.blocks, header.shape)))
            dtypes = " or ".join(str(dtype) for dtype in self.scale_dtypes)
            what = (
                f"{scale_key} is {scale.dtype} {list(scale.shape)}; {key} {list(header.shape)} as {self.name} needs {needed} of {dtypes}."
            )
            return stored._replace(problems=(CheckpointError(what),))
        block = fitting[0]
        rows = 0 if block is None else 1 if len(header.shape) > 2 else block[0]
        parts = (values, Part("scale", scale_key, scale, rows))
        return StoredTensor(key, header.shape, parts, ScaledUnpack(block, self.in_scale_dtype), method=self.name)

    def published_bytes(self, shape: Shape) -> int:
        _, shapes = next(_candidates(self.blocks, shape))
        return prod(shape) * self.dtypes[0].itemsize + prod(shapes[0]) * self.scale_dtypes[0].itemsize


@lru_cache(4096)
def _fitting(blocks: tuple[Block, ...], shape: Shape, scale: Shape) -> tuple[Block, ...]:
    """What shares a scale in a tensor of this shape whose scales have that shape: there are 50,000 tensors of a few shapes."""
    return tuple(block for block, shapes in _candidates(blocks, shape) if scale in shapes)


def _candidates(blocks: tuple[Block, ...], shape: Shape) -> Iterator[tuple[Block, tuple[Shape, ...]]]:
    """(rows and columns that share a scale, the shapes that scales may then have) of a tensor of this shape."""
    for block in blocks:
        if block is None:
            if len(shape) == 3:  # stacked experts, one scale each
                yield (shape[1], shape[2]), (shape[:1], (shape[0], 1), (shape[0], 1, 1))
            yield None, ((), (1,), (1, 1), (1, 1, 1))
        elif len(shape) >= 2:
            sides = (1, shape[-1]) if block == ROW else (min(block[0], max(shape[-2], 1)), min(block[1], max(shape[-1], 1)))
            grid = scale_shape(shape, sides)
            yield sides, (grid, grid[:-1]) if block == ROW else (grid,)


def scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """The shape of a tensor's scales: one a block of the last two axes, the last blocks possibly cut short."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
