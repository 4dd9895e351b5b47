"""FP8 rows times FP8 weights: by a kernel on a GPU that has FP8, by torch alone on a CPU."""

from functools import cache
from typing import Any

import torch

from m2ray.model.float8 import twin
from m2ray.model.float8.rounding import BLOCK

ROWS = 128
"""Of a tile of the result, which is BLOCK wide."""

STAGES, WARPS, PROGRAMS = 4, 8, 1
"""Of the kernel: steps that are on their way; warps; programs on each of a GPU's processors."""


@torch.library.custom_op("m2ray::multiply_float8", mutates_args=())
def multiply(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
) -> torch.Tensor:
    """Each group of rows times the transpose of a weight of its own, in bfloat16, of sums in float32.

    Args:
        rows, row_scales: of `round_rows`: FP8 [N, W], float32 [N, W / 128].
        weight, weight_scales: FP8 [G, O, W], float32 [G, O / 128, W / 128], rounded up.
        ends: int32 [G], where each group of rows ends and the next one begins; None where G is 1.
        take: int64, the row that stands at each place; None where each stands at its own.
        put: int64, the row of the result that each place gives; None for its own.

    Returns:
        [places, O]. What stands behind the last end is whatever memory held.
    """
    if rows.device.type == "cuda":
        return _by_kernel(rows, row_scales, weight, weight_scales, ends, take, put)
    return twin.multiply(rows, row_scales, weight, weight_scales, ends, take, put).to(torch.bfloat16)


@multiply.register_fake
def _(
    rows: torch.Tensor,
    _row_scales: torch.Tensor,
    weight: torch.Tensor,
    _weight_scales: torch.Tensor,
    _ends: torch.Tensor | None,
    take: torch.Tensor | None,
    _put: torch.Tensor | None,
) -> torch.Tensor:
    return rows.new_empty((len(rows) if take is None else len(take), weight.shape[1]), dtype=torch.bfloat16)


def tiles_of(ends: torch.Tensor | None, num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles of ROWS rows that groups are cut into: int32 [T, 3], of each its group, its first row and where the group ends; and how many of
    them there are, int32 [1], since T is the most that there can be.
    """
    if ends is None:
        ends = torch.full((1,), num_rows, dtype=torch.int32, device=device)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    counts = (ends - starts + ROWS - 1) // ROWS
    behind = counts.cumsum(0, dtype=torch.int32)
    number = torch.arange(-(-num_rows // ROWS) + len(ends), dtype=torch.int32, device=device)
    group = torch.searchsorted(behind, number, right=True).clamp(max=len(ends) - 1)
    first = starts[group] + (number - behind[group] + counts[group]) * ROWS
    return torch.stack([group.int(), first, ends[group]], 1), behind[-1:]


def _by_kernel(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
) -> torch.Tensor:
    num_rows = len(rows) if take is None else len(take)
    _, columns, width = weight.shape
    out = rows.new_empty((num_rows, columns), dtype=torch.bfloat16)
    tiles, num_tiles = tiles_of(ends, num_rows, rows.device)
    programs = min(PROGRAMS * _processors(rows.device), len(tiles) * -(-columns // BLOCK))
    with torch.cuda.device(rows.device):
        _kernel()[programs,](
            rows, row_scales, weight, weight_scales, tiles, num_tiles, take, put, out,
            WIDTH=width, COLUMNS=columns, ROWS=ROWS, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return out


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel() -> Any:
    from m2ray.model.float8.kernel import multiply_tiles

    return multiply_tiles
