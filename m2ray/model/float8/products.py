"""FP8 rows times FP8 weights: by a kernel on a GPU that has FP8, by torch alone on a CPU. For torch.compile one operation."""

import torch

from m2ray.model.float8 import twin
from m2ray.model.float8.launching import gated_on_hopper
from m2ray.model.float8.proof import kernel_for
from m2ray.model.float8.rounding import BLOCK


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
        return kernel_for(rows.device)(rows, row_scales, weight, weight_scales, ends, take, put)
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
    # Not `len`: it makes a number of a size that is open, and each shape would be compiled again.
    return rows.new_empty(((rows if take is None else take).shape[0], weight.shape[1]), dtype=torch.bfloat16)


@torch.library.custom_op("m2ray::multiply_gated_float8", mutates_args=())
def multiply_gated(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of each group of rows, as FP8 with scales: on a GPU where `m2ray.model.float8.proof.has_gated` says so.

    Args:
        weight: gate and up one behind the other, [G, 2 I, W].

    Returns:
        FP8 [N, I], float32 [N, I / 128].
    """
    if rows.device.type == "cuda":
        return gated_on_hopper(rows, row_scales, weight, weight_scales, ends)
    return twin.multiply_gated(rows, row_scales, weight, weight_scales, ends)


@multiply_gated.register_fake
def _(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, _weight_scales: torch.Tensor, _ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width = weight.shape[1] // 2
    return rows.new_empty((rows.shape[0], width)), row_scales.new_empty((rows.shape[0], width // BLOCK))
