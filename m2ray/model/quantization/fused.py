"""Many quantised tensors unpacked on a GPU by one launch of a fused kernel: which ones it can take, and the table that it reads them from.

Its arithmetic is that of the methods' own unpacking in torch, which does the others, and all of them where there is no kernel. There are two:
for values of 8 bits one that runs along memory, for those of 4 bits one that finds each by its place.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from m2ray.model.extents import RowsToLoad
from m2ray.model.quantization.nibbles import Check, Codes, NibbleUnpack
from m2ray.model.quantization.scaling import ScaledUnpack
from m2ray.toolchain import triton_problem

CHUNK = 8
"""Values of 8 bits that have one scale and lie in one row: 8 bytes are loaded and 16 written at once."""

CHUNKS, SIDE, WARPS = 1024, 64, 8
"""Chunks of a program for 8 bits, values along either side of one for 4 bits, and warps of either."""

NOWHERE = -1
"""In a line the place of what a tensor has not. Places are bytes of a buffer, or addresses as negative numbers, of which this is none."""

VALUES = {torch.float8_e4m3fn: 0, torch.int8: 1, torch.float8_e5m2: 2}
CODES = {Codes.E2M1: 3, Codes.E2M1_WITHOUT_NEGATIVE_ZERO: 4, Codes.UNSIGNED: 5, Codes.LESS_8: 6}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.float8_e8m0fnu: 4, torch.float8_e4m3fn: 5}
"""The numbers by which the kernels know what values and scales are."""

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

    @property
    def is_of_bytes(self) -> bool:
        """Whether its values have 8 bits."""
        return self.values_kind in VALUES.values()

    @property
    def tiles(self) -> int:
        """Programs that it takes."""
        if self.is_of_bytes:
            return -(-self.rows * self.columns // (CHUNK * CHUNKS))
        return -(-self.rows // SIDE) * -(-self.columns // SIDE)


def is_for_kernel(wanted: RowsToLoad, device: torch.device) -> bool:
    """Whether a fused kernel can be used: a matrix, or several stacked, with scales, to become bfloat16 on a GPU that has FP8, and a machine on
    which Triton can make it. Blocks' sides are powers of two, or the matrix's own.
    """
    into, parts = wanted.into, wanted.parts.values()
    return (
        isinstance(wanted.unpack, ScaledUnpack | NibbleUnpack)
        and into.device == device
        and into.dtype == torch.bfloat16
        and into.dim() in (2, 3)
        and 0 < into.numel() < 2**31
        and all(part.offset % part.dtype.itemsize == 0 for part in parts)
        and all(_shift(side, extent) is not None for side, extent in zip(_block(wanted), into.shape[-2:], strict=True))
        and (1 in into.stride()[-2:] if isinstance(wanted.unpack, NibbleUnpack) else _lies_in_chunks(wanted))
        and has_kernel(device)
    )


def _lies_in_chunks(wanted: RowsToLoad) -> bool:
    """Whether 8-bit values can be read, and what they become be written, by whole chunks."""
    into = wanted.into
    sides = (wanted.values.offset, into.shape[-1], *into.stride()[:-1], into.data_ptr() // into.itemsize, _block(wanted)[1])
    return len(wanted.values.shape) == into.dim() and into.stride(-1) == 1 and not any(side % CHUNK for side in sides)


class KernelTable:
    """The lines of many matrices, of which one launch does a run."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
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
        self._lines += [line_of(wanted, into, found) for into, found in _matrices(wanted, places)]

    def to(self, device: torch.device) -> None:
        """Copy the table to where the kernel runs."""
        self._on_device = torch.from_numpy(np.array(self._lines, np.int64).reshape(-1, len(Line._fields))).to(device)

    def run(self, data: torch.Tensor, lines: slice) -> None:
        """Unpack these matrices out of the buffer `data`, uint8, which begins at a multiple of 16 bytes, on the current stream."""
        assert self._on_device is not None, "to() comes first"
        assert data.data_ptr() % 16 == 0, "chunks are read by whole words"
        first = lines.start
        for is_of_bytes, run in groupby(self._lines[lines], lambda line: line.is_of_bytes):
            tiles = [line.tiles for line in run]
            table, most = self._on_device[first : first + len(tiles)], max(tiles)
            kernel, size = (_kernel("unpack_bytes"), CHUNKS) if is_of_bytes else (_kernel("unpack_nibbles"), SIDE)
            kernel[(len(tiles) * most,)](table, data, most, size, num_warps=WARPS)
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
    line = _line(wanted, into, places, VALUES[wanted.values.dtype])
    return line._replace(in_float16=unpack.in_scale_dtype and scale == torch.float16)


def _of_nibbles(wanted: RowsToLoad, into: torch.Tensor, places: Mapping[str, int]) -> Line:
    unpack, is_transposed = wanted.unpack, into.stride(1) != 1
    assert isinstance(unpack, NibbleUnpack)
    return _line(wanted, into, places, CODES[unpack.codes])._replace(
        stride=into.stride(1 if is_transposed else 0),
        in_float16=wanted.parts["scale"].dtype == torch.float16,
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


def _line(wanted: RowsToLoad, into: torch.Tensor, places: Mapping[str, int], values_kind: int) -> Line:
    """What lines of both kernels have."""
    rows, columns = into.shape
    height, width = _block(wanted)
    return Line(
        places["values"],
        places["scale"],
        into.data_ptr(),
        rows,
        columns,
        into.stride(0),
        -(-columns // width),
        _shift(height, rows) or 0,
        _shift(width, columns) or 0,
        values_kind,
        SCALES[wanted.parts["scale"].dtype],
    )


def _block(wanted: RowsToLoad) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    unpack = wanted.unpack
    assert isinstance(unpack, ScaledUnpack | NibbleUnpack)
    return unpack.block or (wanted.into.shape[-2], wanted.into.shape[-1])


def _shift(side: int, extent: int) -> int | None:
    """By how much to shift a place for the number of its block; None if that takes a division."""
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
