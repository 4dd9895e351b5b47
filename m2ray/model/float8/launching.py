"""The kernels that multiply FP8, launched: cuBLAS's own where it has one, else ours. Each function is as `m2ray.model.float8.products.multiply`, on the GPU that its tensors are on."""

from functools import cache
from typing import Any

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from m2ray.model import expert_products
from m2ray.model.float8.rounding import BLOCK

ROWS = 128
"""Of a tile of the result, which is BLOCK wide."""

STAGES, WARPS, PROGRAMS = 4, 8, 1
"""Of Triton's kernel: steps that are on their way, where a processor has room for them (Ada has for 3); warps; programs on each processor."""

PAIR = 2 * BLOCK
"""Rows of a weight that Hopper's kernel takes at a time."""

STEP_BYTES = (ROWS + BLOCK) * BLOCK
"""Of rows and of the weight."""

HELD = 4
"""Blocks of rows that a program of Hopper's kernel holds, each with two of the weight: 48 KiB."""


def by_triton(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
) -> torch.Tensor:
    """On any GPU that has FP8."""
    num_rows = len(rows) if take is None else len(take)
    _, columns, width = weight.shape
    out = rows.new_empty((num_rows, columns), dtype=torch.bfloat16)
    tiles, num_tiles = tiles_of(ends, num_rows, rows.device)
    programs = min(PROGRAMS * _processors(rows.device), len(tiles) * -(-columns // BLOCK))
    with torch.cuda.device(rows.device):
        _triton_kernel()[programs,](
            rows, row_scales, weight, weight_scales, tiles, num_tiles, take, put, out,
            WIDTH=width, COLUMNS=columns, ROWS=ROWS, STAGES=_stages(rows.device), num_warps=WARPS,
        )  # fmt: skip
    return out


def on_hopper(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
) -> torch.Tensor:
    """On a Hopper: one weight by cuBLAS, which knows such scales there, several by a kernel of its own, where they are of whole pairs of blocks. The unit
    that copies blocks takes rows as they lie, so they are brought in order first.
    """
    _, columns, _ = weight.shape
    is_one = put is None and columns % BLOCK == 0
    if (ends is None and not is_one) or (ends is not None and columns % PAIR):
        return by_triton(rows, row_scales, weight, weight_scales, ends, take, put)
    if take is not None:
        rows, row_scales = rows[take], row_scales[take]
    if ends is None:
        return _by_cublas(rows, row_scales, weight[0], weight_scales[0])
    out = rows.new_empty((len(rows), columns), dtype=torch.bfloat16)
    _multiply_pairs(rows, row_scales, weight, weight_scales, ends, put, out, None)
    return out


def gated_on_hopper(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `m2ray.model.float8.products.multiply_gated`."""
    width = weight.shape[1] // 2
    out, out_scales = (
        torch.empty((len(rows), width), dtype=rows.dtype, device=rows.device),
        row_scales.new_empty((len(rows), width // BLOCK)),
    )
    _multiply_pairs(rows, row_scales, weight, weight_scales, ends, None, out, out_scales)
    return out, out_scales


def _multiply_pairs(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor,
    put: torch.Tensor | None,
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
) -> None:
    """Gated where there is a place for scales of the result."""
    _, columns, width = weight.shape
    kernel, blocks_of = _hopper_kernel()
    with torch.cuda.device(rows.device):
        tiles = expert_products.tiles(ends, len(rows))
        kernel[_processors(rows.device),](
            blocks_of(rows),
            row_scales,
            blocks_of(weight.view(-1, width)),
            weight_scales,
            tiles,
            ends,
            ends if put is None else put,
            out,
            row_scales if out_scales is None else out_scales,
            WIDTH=width,
            COLUMNS=columns,
            STAGES=HELD,
            GATED=out_scales is not None,
            HAS_PUT=put is not None,
            num_warps=4,
        )


def _by_cublas(rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    """It wants a multiple of 4 rows, whose scales lie one row's beside another's, and of 4 scales in a row of the weight's."""
    odd_rows, odd_scales = -len(rows) % 4, -weight_scales.shape[1] % 4
    if odd_rows:
        rows, row_scales = (pad(each.view(torch.uint8), (0, 0, 0, odd_rows)).view(each.dtype) for each in (rows, row_scales))
    scales = pad(weight_scales, (0, odd_scales)) if odd_scales else weight_scales
    out = scaled_mm(
        rows,
        weight.t(),
        row_scales.t().contiguous().t(),
        ScalingType.BlockWise1x128,
        scales.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[: len(out) - odd_rows]


def tiles_of(ends: torch.Tensor | None, num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles of ROWS rows that groups are cut into: int32 [T, 3], of each its group, its first row and where the group ends; and how many of
    them there are, int32 [1], since T is the most that there can be.
    """
    if ends is None:
        ends = torch.full((1,), num_rows, dtype=torch.int32, device=device)
    starts = pad(ends[:-1], (1, 0))
    counts = (ends - starts + ROWS - 1) // ROWS
    behind = counts.cumsum(0, dtype=torch.int32)
    number = torch.arange(-(-num_rows // ROWS) + len(ends), dtype=torch.int32, device=device)
    group = torch.searchsorted(behind, number, right=True).clamp(max=len(ends) - 1)
    first = starts[group] + (number - behind[group] + counts[group]) * ROWS
    return torch.stack([group.int(), first, ends[group]], 1), behind[-1:]


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _stages(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(min(STAGES, properties.shared_memory_per_block_optin // STEP_BYTES))


@cache
def _triton_kernel() -> Any:
    from m2ray.model.float8.triton_kernel import multiply_tiles

    return multiply_tiles


@cache
def _hopper_kernel() -> Any:
    """The kernel, and what makes of a matrix its descriptor by blocks."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from m2ray.model.float8.hopper_kernel import multiply_pairs

    block = [BLOCK, BLOCK]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return multiply_pairs, lambda matrix: TensorDescriptor.from_tensor(matrix, block, layout)
