"""The fused kernels' arithmetic in torch on host memory, by the addresses that a table of m2ray.model.quantization.fused gives."""

import ctypes
from typing import Any

import torch

from m2ray.model.quantization import fused
from m2ray.model.quantization.fused import Line
from m2ray.model.quantization.nibbles import E2M1, Codes
from m2ray.model.quantization.scaling import as_floats

RAN: list[int] = []
"""Lines of each launch."""


class HostKernel:
    """In the place of `fused._kernel`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda table, data, max_tiles, size, **_: self.run(grid[0], table, data, max_tiles)

    def run(self, programs: int, table: torch.Tensor, data: torch.Tensor, max_tiles: int) -> None:
        assert programs == len(table) * max_tiles
        RAN.append(len(table))
        for fields in table.tolist():
            line = Line(*fields)
            assert line.tiles <= max_tiles
            assert line.is_of_bytes == (self._name == "unpack_bytes")
            rows, columns = torch.arange(line.rows)[:, None], torch.arange(line.columns)[None]
            if line.is_of_bytes:
                assert line.values_at % 8 == line.into % 16 == line.stride % 8 == line.columns % 8 == 0
                values = _at(data, line.values_at, rows * line.columns + columns, _key(fused.VALUES, line.values_kind))
                block = (rows >> line.height_shift) * line.block_columns + (columns >> line.width_shift)
                products = values * _scale(data, line, block)
            else:
                products = _nibbles(line, data, rows, columns)
            products = products.half().float() if line.in_float16 else products
            slow = line.columns if line.is_transposed else line.rows
            into = memory(line.into, 2 * line.stride * slow).view(torch.bfloat16).view(slow, line.stride)
            into = into[:, : line.rows].t() if line.is_transposed else into[:, : line.columns]
            into.copy_(products)


def _nibbles(line: Line, data: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    block_rows, block_columns = rows >> line.height_shift, columns >> line.width_shift
    if line.groups_at != fused.NOWHERE:
        block_rows = _at(data, line.groups_at, rows, torch.int32).long()
    scale = _scale(data, line, block_rows * line.block_columns + block_columns)
    if line.tensor_scale_at != fused.NOWHERE:
        tensor_scale = _at(data, line.tensor_scale_at, torch.zeros(1, dtype=torch.int64), torch.float32)
        scale = scale / tensor_scale if line.is_divided else scale * tensor_scale
    codes = _codes(data, line.values_at, _number(line, rows, columns, line.line_columns, line.word_rows_shift))
    kind = _key(fused.CODES, line.values_kind)
    meant = [number - 8 * (kind is Codes.LESS_8) for number in range(16)] if kind in (Codes.UNSIGNED, Codes.LESS_8) else E2M1
    values = torch.tensor(meant, dtype=torch.float32)[codes]
    if kind is Codes.E2M1_WITHOUT_NEGATIVE_ZERO:
        values = torch.where(values == 0, 0.0, values)
    if line.zero_at != fused.NOWHERE:
        place = _number(line, block_rows, block_columns, line.block_columns, line.zero_word_rows_shift)
        values = values - _codes(data, line.zero_at, place, line.zero_more)
    return values * scale


def _number(line: Line, rows: torch.Tensor, columns: torch.Tensor, across: int, word_rows_shift: int) -> torch.Tensor:
    """Which of the stored numbers of four bits one is."""
    if line.is_interleaved:
        columns = columns // 8 * 8 + torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])[columns % 8]
    word_rows = 1 << word_rows_shift
    return (rows // word_rows * across + columns) * word_rows + rows % word_rows


def _codes(data: torch.Tensor, place: int, number: torch.Tensor, more: int = 0) -> torch.Tensor:
    """Numbers of four bits, of words to which `more` is added."""
    if not more:
        return _at(data, place, number // 2, torch.uint8).long() >> (4 * (number % 2)) & 15
    return (_at(data, place, number // 8, torch.int32) + more).long() >> (4 * (number % 8)) & 15


def _scale(data: torch.Tensor, line: Line, index: torch.Tensor) -> torch.Tensor:
    dtype = _key(fused.SCALES, line.scale_kind)
    found = _at(data, line.scale_at, index, torch.uint8 if dtype.itemsize == 1 else dtype)
    return as_floats(found.view(dtype)) if dtype.itemsize == 1 else found.float()


def _at(data: torch.Tensor, place: int, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    address = -place if place < 0 else data.data_ptr() + place
    found = memory(address, (int(index.max()) + 1) * dtype.itemsize).view(dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point:  # torch does not index them
        return found.view(torch.uint8)[index].view(dtype).float()
    return found[index] if dtype in (torch.int32, torch.uint8) else found[index].float()


def _key(numbers: dict[Any, int], number: int) -> Any:
    return next(key for key, each in numbers.items() if each == number)


def memory(address: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
