"""8-bit values times their scales: `(values.float() * scale.float()).to(bfloat16)`, as fast as torch does it on a CPU.

torch turns float8_e4m3fn into float32 one by one. Its bits are those of a float16 which is 256 times smaller, but for NaN, and float16 is
turned by vectors: nine times as fast. The products are the same, since a power of two rounds nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from m2ray.model.quantization import bytes_on_cpu, shifts
from m2ray.model.quantization.scratch import scratch_tensor
from m2ray.model.quantization.stored import settled

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None for one scale a tensor."""

_ELEMENTS_AT_ONCE = 1 << 20
"""In float32 at one time on a CPU. Of fewer, which stay in a core's cache, the threads' turns at the interpreter cost more than that saves: with a quarter
as many FP8 came at 1.8 GB/s where it comes at 2.6 (2 cores)."""

_SMALLER = 256.0
_LARGE = 2.0**119
"""Of scales, from where on they may not be 256 times as large."""


@dataclass(frozen=True)
class ScaledUnpack:
    """Values [..., rows, columns] times their scales, as bfloat16: parts "values" and "scale".

    Attributes:
        in_scale_dtype: round the product to the scale's dtype first.
    """

    block: Block
    in_scale_dtype: bool = False

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = parts["values"]
        out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
        self.write(parts, out)
        return out

    def write(self, parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> None:
        """The same, written into bfloat16 of any strides."""
        values, scale = parts["values"], parts["scale"]
        first = scale.dtype if self.in_scale_dtype and scale.dtype == torch.float16 else torch.float32
        factors = as_floats(scale)
        if values.dim() < 3:
            matrix = values if values.dim() == 2 else values.reshape(1, -1)
            _write(matrix, factors, self.block, first, into.view(matrix.shape) if into.dim() < 2 else into)
            return
        for number, matrix in enumerate(values):
            _write(matrix, factors if self.block is None else factors[number], self.block, first, into[number])


def dequantize(values: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """8-bit values as bfloat16, each scale over its block of the last two axes.

    Args:
        values: FP8 or int8 [..., rows, columns].
        scale: a number for each block, the last ones of rows and of columns possibly cut short; one number if `block` is None.
    """
    return ScaledUnpack(block)({"values": values, "scale": scale})


def as_floats(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32. uint8 are exponents of two, less 127, of which 255 is none: infinity, as in transformers."""
    if scale.dtype.itemsize > 1:
        return scale.float()
    bits = scale.reshape(-1).view(torch.uint8).int()
    return torch.index_select(_floats(scale.dtype, scale.device), 0, bits).view(scale.shape)


@cache
def _floats(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256], by their bits the numbers of a dtype that torch turns into float32 one by one."""
    if dtype == torch.uint8:
        return settled(torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("inf")], device=device))
    return settled(torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device))


def _write(values: torch.Tensor, factors: torch.Tensor, block: Block, first: torch.dtype, into: torch.Tensor) -> None:
    """Write values [R, C] times the factors of their blocks, rounded to `first`, into `into`: as much at a time as stays in a core's cache."""
    num_rows, columns = values.shape
    height, width = block or (max(num_rows, 1), max(columns, 1))
    factors = factors.reshape(-(-num_rows // height), -(-columns // width))
    if factors.numel() == 1 and bytes_on_cpu.can_look_up(values):
        factor = factors.view(1)
        bytes_on_cpu.look_up_bytes(values, lambda codes: (codes.float() * factor).to(first).float().to(torch.bfloat16), into)
        return
    if first == torch.float32 and shifts.can_write(values, factors, width):
        shifts.write(values, factors, height, into)
        return
    smaller = _can_be_smaller(values, factors)
    factors = factors * _SMALLER if smaller else factors
    by_column = factors.repeat_interleave(width, 1)[:, :columns] if columns % width and factors.shape[1] > 1 else None
    unit = height if factors.shape[0] > 1 else 1
    rows_step, columns_step = _steps(values, unit, is_by_row=factors.shape[1] == 1)
    floats_of = _Floats(min(rows_step, num_rows) * min(columns_step, columns), values.device, smaller=smaller)
    for row, stop in _row_runs(num_rows, rows_step, unit):
        for column in range(0, columns, columns_step):
            floats = floats_of(values[row:stop, column : column + columns_step])
            first_block = row // height
            if by_column is None:
                _multiply(floats, factors[first_block:], height, width if factors.shape[1] > 1 else floats.shape[1])
            else:
                _multiply(floats, by_column[first_block:], height, 1)
            into[row:stop, column : column + columns_step].copy_(floats if first == torch.float32 else floats.to(first).float())


def _steps(values: torch.Tensor, height: int, *, is_by_row: bool) -> tuple[int, int]:
    """How many rows, of whole blocks or of a part of one, and columns of values are done at one time."""
    num_rows, columns = values.shape
    if values.is_cuda:
        return max(num_rows, 1), max(columns, 1)
    rows = max(1, _ELEMENTS_AT_ONCE // max(columns, 1))
    rows = rows // height * height or rows
    return rows, _ELEMENTS_AT_ONCE if is_by_row and rows == 1 else max(columns, 1)


def _row_runs(num_rows: int, step: int, height: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `step` rows. None that is shorter than a block goes over the end of one."""
    unit = height if step < height else max(num_rows, 1)
    for first in range(0, num_rows, unit):
        stop = min(first + unit, num_rows)
        for row in range(first, stop, step):
            yield row, min(row + step, stop)


def _multiply(floats: torch.Tensor, factors: torch.Tensor, height: int, width: int) -> None:
    """Multiply floats [R, C], from a block's first row on, by the factors [blocks, C / width] of its rows' blocks."""
    whole = len(floats) // height
    if whole:
        blocks = floats[: whole * height].view(whole, height, -1, width)
        blocks.mul_(factors[:whole, None, :, None])
    if whole * height < len(floats):
        floats[whole * height :].view(len(floats) - whole * height, -1, width).mul_(factors[whole, :, None])


def _can_be_smaller(values: torch.Tensor, factors: torch.Tensor) -> bool:
    """Whether values are float8_e4m3fn on a CPU, none of them NaN (which is no weight), with factors that can be 256 times as large."""
    if values.dtype != torch.float8_e4m3fn or values.is_cuda or not values.numel():
        return False
    has_nan = values.view(torch.uint8).amax() == 0xFF or values.view(torch.int8).amax() == 0x7F
    return bool(factors.abs().amax() < _LARGE) and not has_nan


class _Floats:
    """Makes 8-bit values float32, or, of float8_e4m3fn, 256 times smaller ones, again and again in the same memory: new memory costs more."""

    def __init__(self, elements: int, device: torch.device, *, smaller: bool) -> None:
        self._floats = torch.empty(elements, device=device) if device.type != "cpu" else scratch_tensor("floats", torch.float32, elements)
        self._halves = scratch_tensor("halves", torch.int16, elements) if smaller else None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        floats = self._floats[: values.numel()].view(values.shape)
        if self._halves is None:
            return floats.copy_(values)
        halves = self._halves[: values.numel()].view(values.shape).copy_(values.view(torch.int8))
        halves.mul_(1 << 7).bitwise_and_(~(1 << 14))  # the sign is twice there
        return floats.copy_(halves.view(torch.float16))
