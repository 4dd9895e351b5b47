"""Block-wise FP8 as bfloat16, `(weight.float() * scale).to(bfloat16)`: the formula in torch, and a fused kernel for many tensors at once."""

from functools import cache
from typing import Any

import numpy as np
import torch

from m2ray.model.extents import RowsToLoad
from m2ray.toolchain import triton_problem

Block = tuple[int, int] | None
"""Rows and columns of an FP8 scale's block; None for one scale a tensor."""


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """Block-wise FP8 as bfloat16, each scale over its block of the last two axes.

    Args:
        weight: FP8 [..., rows, columns].
        scale: [..., row blocks, column blocks], the last ones possibly cut short; one number if `block` is None.
        block: rows and columns of a block.
    """
    values = weight.float()
    if block is None:
        return values.mul_(scale.float().reshape(())).to(torch.bfloat16)
    scale_by_column = scale.float().repeat_interleave(block[1], dim=-1)[..., : weight.shape[-1]]
    for rows, row_scale in zip(values.split(block[0], dim=-2), scale_by_column.unbind(-2), strict=True):
        rows.mul_(row_scale.unsqueeze(-2))
    return values.to(torch.bfloat16)


def is_for_kernel(wanted: RowsToLoad, block: Block, device: torch.device) -> bool:
    """Whether the fused kernel can be used: Hopper's FP8 on a GPU that has it, float32 scales, blocks of powers of two, bfloat16 rows, and
    a machine on which Triton can make it. Elsewhere the formula is used, which is slower.
    """
    values, scale, into = wanted.values, wanted.scale, wanted.into
    return (
        values.dtype == torch.float8_e4m3fn
        and scale is not None
        and scale.dtype == torch.float32
        and scale.offset % scale.dtype.itemsize == 0
        and len(values.shape) == 2
        and block is not None
        and _has_kernel(block, device)
        and into.device == device
        and into.dtype == torch.bfloat16
        and into.stride(-1) == 1
    )


class KernelTable:
    """What the fused kernel has to know of each tensor, int64 [tensors, 7]: one launch does a run of them.

    Columns: the byte of a buffer at which the weight begins; that of its float32 scales in the same buffer, or their address as a negative
    number; the address of the bfloat16 rows to be written; rows; columns; elements from one written row to the next; scales in a row.
    """

    COLUMNS = 7

    def __init__(self, block: tuple[int, int]) -> None:
        self._block = block
        self._rows: list[tuple[int, ...]] = []
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, wanted: RowsToLoad, weight_at: int, scale_at: int) -> int:
        """Add a tensor, whose `scale_at` may be an address, as a negative number. Returns the number of its blocks."""
        assert wanted.scale is not None
        rows, columns = wanted.values.shape
        row_blocks, column_blocks = wanted.scale.shape
        self._rows.append((weight_at, scale_at, wanted.into.data_ptr(), rows, columns, wanted.into.stride(0), column_blocks))
        return row_blocks * column_blocks

    def add_nothing(self) -> None:
        """Add a tensor without rows."""
        self._rows.append((0, 0, 0, 0, 1, 1, 1))

    def to(self, device: torch.device) -> None:
        """Copy the table to where the kernel runs."""
        rows = np.array(self._rows, np.int64).reshape(-1, self.COLUMNS)
        self._on_device = torch.from_numpy(rows).to(device)

    def run(self, data: torch.Tensor, tensors: slice, max_blocks: int) -> None:
        """Dequantise these tensors, of at most `max_blocks` blocks each, out of the buffer `data`, uint8, on the current stream."""
        assert self._on_device is not None, "to() comes first"
        table = self._on_device[tensors]
        _kernel()[(len(table) * max_blocks,)](table, data, max_blocks, *self._block, num_warps=8)


def warm_up(block: tuple[int, int], device: torch.device) -> None:
    """Compile the kernel, if it serves for such blocks: Triton does so when it is first run."""
    if _has_kernel(block, device):
        with torch.cuda.device(device):
            table = KernelTable(block)
            table.add_nothing()
            table.to(device)
            table.run(torch.zeros(16, dtype=torch.uint8, device=device), slice(0, 1), 1)


@cache
def _has_kernel(block: tuple[int, int], device: torch.device) -> bool:
    is_power_of_two = all(side & (side - 1) == 0 for side in block)
    return device.type == "cuda" and is_power_of_two and torch.cuda.get_device_capability(device) >= (8, 9) and not triton_problem()


@cache
def _kernel() -> Any:
    from m2ray.model.fp8_kernel import dequantize_tensors

    return dequantize_tensors
