"""FP8 and 8-bit integers with a scale for each block of values: of all of a tensor, a row, a block of rows and columns, or 32 values of a row.

`(values.float() * scale.float()).to(bfloat16)`. References: transformers 5.24, integrations/finegrained_fp8.py (Fp8Dequantize) for `fp8` and
`mxfp8`; compressed-tensors 0.20, quantization/lifecycle (dequantize), which multiplies in the scale's dtype: the same bits but for float16
(`in_scale_dtype`); nvidia-modelopt 0.47, FP8QTensor.dequantize(torch.float32) and MXFP8QTensor.dequantize. Scales of 8 bits are
exponents of two, less 127: float8_e8m0fnu, or the same as uint8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from m2ray.errors import CheckpointError
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.stored import MISMATCH, Part, Shape, StoredTensor

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None for one scale a tensor."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENT_SCALES = (torch.float8_e8m0fnu, torch.uint8)

ROW = (1, 0)
"""Of all a row's columns one scale."""

_CACHED_ELEMENTS = 1 << 18
"""In float32 at one time on a CPU: 1 MiB stays in a core's cache."""


@dataclass(frozen=True)
class ScaledUnpack:
    """Values [..., rows, columns] times their scales, as bfloat16.

    Attributes:
        in_scale_dtype: round the product to the scale's dtype first.
    """

    block: Block
    in_scale_dtype: bool = False

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = parts["scale"]
        first = scale.dtype if self.in_scale_dtype and scale.dtype == torch.float16 else None
        return dequantize(parts["values"], scale, self.block, first)


def dequantize(values: torch.Tensor, scale: torch.Tensor, block: Block, first: torch.dtype | None = None) -> torch.Tensor:
    """8-bit values as bfloat16, each scale over its block of the last two axes.

    Args:
        values: FP8 or int8 [..., rows, columns].
        scale: a number for each block, the last ones of rows and of columns possibly cut short; one number if `block` is None.
        first: a dtype that the products are rounded to before bfloat16.
    """
    factors = as_floats(scale)
    out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    if block is None:
        _multiply(values.reshape(1, -1), factors.reshape(1, 1), (1, values.numel()), first, out.view(1, -1))
        return out
    rows, columns = values.shape[-2:]
    grid = (-1, -(-rows // block[0]), -(-columns // block[1]))
    matrices = zip(values.reshape(-1, rows, columns), factors.reshape(grid), out.view(-1, rows, columns), strict=True)
    for matrix, factors_of, into in matrices:
        _multiply(matrix, factors_of, block, first, into)
    return out


def as_floats(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32. uint8 are exponents of two, less 127, of which 255 is none: infinity, as in transformers."""
    return _powers(scale.device)[scale.int()] if scale.dtype == torch.uint8 else scale.float()


@cache
def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("inf")], device=device)


def _multiply(values: torch.Tensor, factors: torch.Tensor, block: tuple[int, int], first: torch.dtype | None, into: torch.Tensor) -> None:
    """Write values [R, C] times factors [row blocks, column blocks] into `into`, as many rows at a time as stay in a core's cache."""
    num_rows, columns = values.shape
    height, width = block
    step = num_rows if values.is_cuda else max(1, _CACHED_ELEMENTS // max(columns * height, 1)) * height
    if columns > _CACHED_ELEMENTS and factors.numel() == 1 and not values.is_cuda:
        for part, out in zip(values.split(_CACHED_ELEMENTS, 1), into.split(_CACHED_ELEMENTS, 1), strict=True):
            out.copy_(_rounded(part.float().mul_(factors), first))
        return
    if columns % width and factors.shape[1] > 1:
        factors, width = factors.repeat_interleave(width, 1)[:, :columns], 1
    elif columns % width:
        width = columns
    for start in range(0, num_rows, step):
        floats = values[start : start + step].float()
        whole = len(floats) // height * height
        part_factors = factors[start // height : -(-(start + len(floats)) // height)]
        if whole:
            blocks = floats[:whole].view(whole // height, height, columns // width, width)
            blocks.mul_(part_factors[: whole // height, None, :, None])
        if whole < len(floats):
            floats[whole:].view(-1, columns // width, width).mul_(part_factors[-1, :, None])
        into[start : start + step].copy_(_rounded(floats, first))


def _rounded(floats: torch.Tensor, first: torch.dtype | None) -> torch.Tensor:
    return floats if first is None else floats.to(first)


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

    @property
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
        candidates = list(self._candidates(header.shape))
        fitting = [block for block, shapes in candidates if scale.shape in shapes]
        if not fitting or scale.dtype not in self.scale_dtypes:
            needed = " or ".join(dict.fromkeys(str(list(shapes[0])) for _, shapes in candidates))
            dtypes = " or ".join(str(dtype) for dtype in self.scale_dtypes)
            what = (
                f"{scale_key} is {scale.dtype} {list(scale.shape)}; {key} {list(header.shape)} as {self.name} needs {needed} of {dtypes}."
            )
            return stored._replace(problems=(CheckpointError(what),))
        block = fitting[0]
        rows = 0 if block is None else 1 if len(header.shape) > 2 else block[0]
        parts = (values, Part("scale", scale_key, scale, rows))
        return stored._replace(parts=parts, unpack=ScaledUnpack(block, self.in_scale_dtype))

    def published_bytes(self, shape: Shape) -> int:
        _, shapes = next(self._candidates(shape))
        return prod(shape) * self.dtypes[0].itemsize + prod(shapes[0]) * self.scale_dtypes[0].itemsize

    def _candidates(self, shape: Shape) -> Iterator[tuple[Block, tuple[Shape, ...]]]:
        """(rows and columns that share a scale, the shapes that scales may then have) of a tensor of this shape."""
        for block in self.blocks:
            if block is None:
                if len(shape) == 3:  # stacked experts, one scale each
                    yield (shape[1], shape[2]), (shape[:1], (shape[0], 1), (shape[0], 1, 1))
                yield None, ((), (1,), (1, 1), (1, 1, 1))
            elif len(shape) >= 2:
                sides = (1, shape[-1]) if block == ROW else block
                grid = scale_shape(shape, sides)
                yield sides, (grid, grid[:-1]) if block == ROW else (grid,)


def scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """The shape of a tensor's scales: one a block of the last two axes, the last blocks possibly cut short."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
