"""Many 8-bit tensors unpacked on a GPU by one launch of a fused kernel: which ones it can take, and the table that it reads them from.

Its arithmetic is `m2ray.model.quantization.scaling.dequantize`'s, which does the others, and all of them where there is no kernel.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from m2ray.model.extents import RowsToLoad
from m2ray.model.quantization.scaling import ScaledUnpack
from m2ray.toolchain import triton_problem

TILE = (16, 256)
"""Rows and columns that one program of the kernel does."""

VALUES = {torch.float8_e4m3fn: 0, torch.int8: 1, torch.float8_e5m2: 2}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.float8_e8m0fnu: 4}
"""The numbers by which the kernel knows dtypes."""


def is_for_kernel(wanted: RowsToLoad, device: torch.device) -> bool:
    """Whether the fused kernel can be used: 8-bit rows of a matrix with scales, to become bfloat16 on a GPU that has FP8, and a machine on
    which Triton can make it.
    """
    into = wanted.into
    return (
        isinstance(wanted.unpack, ScaledUnpack)
        and len(wanted.values.shape) == 2
        and not (wanted.unpack.in_scale_dtype and wanted.parts["scale"].dtype == torch.float16)
        and wanted.parts["scale"].offset % wanted.parts["scale"].dtype.itemsize == 0
        and into.device == device
        and into.dtype == torch.bfloat16
        and into.stride(-1) == 1
        and has_kernel(device)
    )


class KernelTable:
    """What the fused kernel has to know of each tensor, int64 [tensors, 11]: one launch does a run of them.

    Columns: the byte of a buffer at which the values begin; that of the scales in the same buffer, or their address as a negative number;
    the address of the bfloat16 rows to be written; rows; columns; elements from one written row to the next; scales in a row of blocks;
    rows and columns of a block; the numbers of the values' and of the scales' dtype.
    """

    COLUMNS = 11

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, wanted: RowsToLoad, values_at: int, scale_at: int) -> int:
        """Add a tensor, whose `scale_at` may be an address, as a negative number. Returns the number of its tiles."""
        assert isinstance(wanted.unpack, ScaledUnpack)
        rows, columns = wanted.values.shape
        height, width = wanted.unpack.block or (max(rows, 1), max(columns, 1))
        dtypes = VALUES[wanted.values.dtype], SCALES[wanted.parts["scale"].dtype]
        into = wanted.into
        self._rows.append(
            (values_at, scale_at, into.data_ptr(), rows, columns, into.stride(0), -(-columns // width), height, width, *dtypes)
        )
        return -(-rows // TILE[0]) * -(-columns // TILE[1])

    def to(self, device: torch.device) -> None:
        """Copy the table to where the kernel runs."""
        rows = np.array(self._rows, np.int64).reshape(-1, self.COLUMNS)
        self._on_device = torch.from_numpy(rows).to(device)

    def run(self, data: torch.Tensor, tensors: slice, max_tiles: int) -> None:
        """Unpack these tensors, of at most `max_tiles` tiles each, out of the buffer `data`, uint8, on the current stream."""
        assert self._on_device is not None, "to() comes first"
        table = self._on_device[tensors]
        _kernel()[(len(table) * max_tiles,)](table, data, max_tiles, *TILE, num_warps=4)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether Triton can make it for this device. What it makes is proved by `m2ray.model.quantization.fused_proof`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) and not triton_problem()


@cache
def _kernel() -> Any:
    from m2ray.model.quantization.fused_kernel import unpack_tensors

    return unpack_tensors
