"""Products by the kernel for Hopper GPUs."""

from functools import cache
from typing import Any

import torch

from m2ray.model.float8.rounding import BLOCK

STAGES = 6
"""Blocks of rows and weight that a program holds, of 32 KiB each."""


def multiply(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
) -> torch.Tensor:
    """As `m2ray.model.float8.products.multiply`."""
    from m2ray.model.float8.products import tiles_of

    if take is not None:
        rows, row_scales = rows[take], row_scales[take]
    _, columns, width = weight.shape
    out = rows.new_empty((len(rows), columns), dtype=torch.bfloat16)
    tiles, num_tiles = tiles_of(ends, len(rows), rows.device)
    programs = min(_processors(rows.device), len(tiles) * -(-columns // BLOCK))
    kernel, descriptor = _kernel()
    with torch.cuda.device(rows.device):
        kernel[programs,](
            descriptor(rows), row_scales, descriptor(weight.view(-1, width)), weight_scales, tiles, num_tiles, tiles if put is None else put, out,
            WIDTH=width, COLUMNS=columns, STAGES=STAGES, HAS_PUT=put is not None, num_warps=4,
        )  # fmt: skip
    return out


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel() -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from m2ray.model.float8.hopper_kernel import multiply_tiles

    block = [BLOCK, BLOCK]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return multiply_tiles, lambda tensor: TensorDescriptor.from_tensor(tensor, block, layout)
