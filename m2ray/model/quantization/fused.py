"""Many quantised tensors unpacked on a GPU by one launch of a fused kernel: which ones it can take, and the table that it reads them from.

Its arithmetic is that of the methods' own unpacking in torch, which does the others, and all of them where there is no kernel. There are two:
one runs along memory; one finds by their place values of 4 bits that lie otherwise than they are written (AWQ, GPTQ, gpt-oss).
"""

from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from m2ray.model.extents import RowsToLoad
from m2ray.model.quantization.nibbles import Check, Codes, NibbleUnpack
from m2ray.model.quantization.scaling import Block, ScaledUnpack
from m2ray.toolchain import triton_problem

CHUNK = 8
"""Values that have one scale and lie in one row: 4 or 8 bytes are loaded and 16 written at once."""

CHUNKS, SIDE, WARPS = 512, 64, 8
"""Chunks of a program that runs along memory, values along either side of a square, and warps of either."""

NOWHERE = -1
"""In a line the place of what a tensor has not. Places are bytes of a buffer, or addresses as negative numbers, of which this is none."""

VALUES = {torch.float8_e4m3fn: 0, torch.int8: 1, torch.float8_e5m2: 2}
CODES = {Codes.E2M1: 3, Codes.E2M1_WITHOUT_NEGATIVE_ZERO: 4, Codes.UNSIGNED: 5, Codes.LESS_8: 6}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.float8_e8m0fnu: 4, torch.float8_e4m3fn: 5}
"""The numbers by which the kernels know what values and scales are."""

FIRST_CODE = min(CODES.values())
"""Below it values have 8 bits."""

_WHOLE = 31
"""The shift of a side that has one block."""


class Line(NamedTuple):
    """What a kernel has to know of one matrix, as int64.

    Attributes:
        values_at: where its values begin; scale_at, zero_at, groups_at, tensor_scale_at alike.
        into: the address of the bfloat16 numbers to be written.
        stride: elements from one written line to the next.
        block_columns: scales in a row of blocks.
        height_shift: of the block's height the power of two, width_shift of its width.
        in_float16: whether products are rounded to float16 first.
        line_columns: of 4 bits: numbers in a stored line.
        is_transposed: whether rows lie next to each other where they are written.
        word_rows_shift: of the rows that share a word, the power of two.
        is_interleaved: whether words are in AWQ's order.
        zero_word_rows_shift: word_rows_shift of zero points.
        zero_more: is added to their words.
        is_divided: whether scales are divided by the tensor's own, not multiplied.
    """

    values_at: int
    scale_at: int
    into: int
    rows: int
    columns: int
    stride: int
    block_columns: int
    height_shift: int
    width_shift: int
    values_kind: int
    scale_kind: int
    in_float16: bool = False
    line_columns: int = 0
    is_transposed: bool = False
    word_rows_shift: int = 0
    is_interleaved: bool = False
    zero_at: int = NOWHERE
    zero_word_rows_shift: int = 0
    zero_more: int = 0
    groups_at: int = NOWHERE
    tensor_scale_at: int = NOWHERE
    is_divided: bool = False

    def kernel(self) -> tuple[str, *tuple[int, ...]]:
        """The name of the kernel for it, and the constants that it is compiled with."""
        bits = 8 if self.values_kind < FIRST_CODE else 4
        # A run is read and written along memory, by whole chunks.
        chunks = self.columns | self.stride | self.into // 2 | self.values_at * 8 // bits | 1 << self.width_shift
        is_placed = self.is_transposed or self.word_rows_shift or self.is_interleaved or self.groups_at != NOWHERE
        if not is_placed and chunks % CHUNK == 0:
            return "unpack_runs", CHUNKS, bits
        assert bits == 4, "8-bit values lie in whole chunks"
        return "unpack_squares", SIDE

    def tiles(self) -> int:
        """Programs that it takes."""
        if self.kernel()[0] == "unpack_runs":
            return -(-self.rows * self.columns // (CHUNK * CHUNKS))
        return -(-self.rows // SIDE) * -(-self.columns // SIDE)


def is_for_kernel(wanted: RowsToLoad, device: torch.device) -> bool:
    """Whether a fused kernel can be used: a matrix, or several stacked, with scales, to become bfloat16 on a GPU that has FP8, and a machine on
    which Triton can make it. Blocks' sides are powers of two, or the matrix's own.
    """
    into, unpack = wanted.into, wanted.unpack
    if not isinstance(unpack, (ScaledUnpack, NibbleUnpack)) or into.dtype != torch.bfloat16 or into.device != device:
        return False
    shape, strides = into.shape, into.stride()
    if len(shape) not in (2, 3) or not 0 < prod(shape) < 2**31 or any(part.offset % part.dtype.itemsize for part in wanted.parts.values()):
        return False
    blocks = _blocks(unpack.block, shape[-2], shape[-1])
    if blocks is None or not has_kernel(device):
        return False
    if isinstance(unpack, NibbleUnpack):
        return 1 in strides[-2:]
    # 8-bit values are read, and what they become is written, by whole chunks.
    chunks = wanted.values.offset | shape[-1] | strides[-2] | strides[0] | into.data_ptr() // 2 | 1 << blocks.width_shift
    return len(wanted.values.shape) == len(shape) and strides[-1] == 1 and chunks % CHUNK == 0


class KernelTable:
    """The lines of many matrices, of which one launch does a run."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._kernels: list[tuple[tuple[str, *tuple[int, ...]], int]] = []  # for each line, and its tiles
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, wanted: RowsToLoad, places: Mapping[str, int]) -> None:
        """Add a tensor; stacked matrices have a line each.

        Args:
            places: by part, the byte of a buffer at which it begins, or its address as a negative number. In the buffer parts are aligned to 16
                bytes as they are in the file.
        """
        line_of = _of_nibbles if isinstance(wanted.unpack, NibbleUnpack) else _of_bytes
        lines = [line_of(wanted, into, found) for into, found in _matrices(wanted, places)]
        self._lines += lines
        self._kernels += [(line.kernel(), line.tiles()) for line in lines]

    def to(self, device: torch.device) -> None:
        """Copy the table to where the kernel runs."""
        self._on_device = torch.from_numpy(np.array(self._lines, np.int64).reshape(-1, len(Line._fields))).to(device)

    def run(self, data: torch.Tensor, lines: slice) -> None:
        """Unpack these matrices out of the buffer `data`, uint8, which begins at a multiple of 16 bytes, on the current stream."""
        assert self._on_device is not None, "to() comes first"
        assert data.data_ptr() % 16 == 0, "chunks are read by whole words"
        first = lines.start
        for (name, *constants), run in groupby(self._kernels[lines], lambda each: each[0]):
            tiles = [each[1] for each in run]
            table, most = self._on_device[first : first + len(tiles)], max(tiles)
            _kernel(name)[(len(tiles) * most,)](table, data, most, *constants, num_warps=WARPS)
            first += len(tiles)


def check_of(wanted: RowsToLoad) -> Check | None:
    """What is to be called with the parts before a kernel unpacks them, since none looks at it."""
    return wanted.unpack.check if isinstance(wanted.unpack, NibbleUnpack) else None


def _matrices(wanted: RowsToLoad, places: Mapping[str, int]) -> Iterator[tuple[torch.Tensor, Mapping[str, int]]]:
    """Where each matrix is to be written, and where its own parts lie."""
    if wanted.into.dim() == 2:
        yield wanted.into, places
        return
    count = len(wanted.into)
    steps = {name: part.num_bytes // count if part.shape[:1] == (count,) else 0 for name, part in wanted.parts.items()}
    for number, into in enumerate(wanted.into):
        yield into, {name: place + (steps[name] if place >= 0 else -steps[name]) * number for name, place in places.items()}


def _of_bytes(wanted: RowsToLoad, into: torch.Tensor, places: Mapping[str, int]) -> Line:
    unpack, scale = wanted.unpack, wanted.parts["scale"].dtype
    assert isinstance(unpack, ScaledUnpack)
    rows, columns = into.shape
    blocks = _blocks(unpack.block, rows, columns)
    assert blocks is not None
    return Line(
        values_at=places["values"],
        scale_at=places["scale"],
        into=into.data_ptr(),
        rows=rows,
        columns=columns,
        stride=into.stride(0),
        block_columns=blocks.columns,
        height_shift=blocks.height_shift,
        width_shift=blocks.width_shift,
        values_kind=VALUES[wanted.values.dtype],
        scale_kind=SCALES[scale],
        in_float16=unpack.in_scale_dtype and scale == torch.float16,
    )


def _of_nibbles(wanted: RowsToLoad, into: torch.Tensor, places: Mapping[str, int]) -> Line:
    unpack, scale, is_transposed = wanted.unpack, wanted.parts["scale"].dtype, into.stride(1) != 1
    assert isinstance(unpack, NibbleUnpack)
    rows, columns = into.shape
    blocks = _blocks(unpack.block, rows, columns)
    assert blocks is not None
    return Line(
        values_at=places["values"],
        scale_at=places["scale"],
        into=into.data_ptr(),
        rows=rows,
        columns=columns,
        stride=into.stride(1 if is_transposed else 0),
        block_columns=blocks.columns,
        height_shift=blocks.height_shift,
        width_shift=blocks.width_shift,
        values_kind=CODES[unpack.codes],
        scale_kind=SCALES[scale],
        in_float16=scale == torch.float16,
        line_columns=2 * wanted.values.num_bytes // prod(wanted.into.shape[:-1]),
        is_transposed=is_transposed,
        word_rows_shift=unpack.word_rows.bit_length() - 1,
        is_interleaved=unpack.is_interleaved,
        zero_at=places.get("zero_point", NOWHERE),
        zero_word_rows_shift=unpack.zero_word_rows.bit_length() - 1,
        zero_more=unpack.zero_more,
        groups_at=places["group"] if unpack.has_group_index else NOWHERE,
        tensor_scale_at=places.get("tensor_scale", NOWHERE),
        is_divided=unpack.is_divided,
    )


class _Blocks(NamedTuple):
    """How a place becomes that of its block: by shifts. `columns` of blocks are in a row."""

    height_shift: int
    width_shift: int
    columns: int


@lru_cache(4096)
def _blocks(block: Block, rows: int, columns: int) -> _Blocks | None:
    """Of a matrix of that size; None if it takes a division. There are 50,000 matrices of a few sizes."""
    height, width = block or (rows, columns)
    down, across = _shift(height, rows), _shift(width, columns)
    return None if down is None or across is None else _Blocks(down, across, -(-columns // width))


def _shift(side: int, extent: int) -> int | None:
    """By how much to shift a place for the number of its block."""
    if side >= extent:
        return _WHOLE
    return side.bit_length() - 1 if side & (side - 1) == 0 else None


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether Triton can make them for this device. What it makes is proved by `m2ray.model.quantization.fused_proof`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) and not triton_problem()


def _kernel(name: str) -> Any:
    from m2ray.model.quantization import fused_kernel

    return getattr(fused_kernel, name)
