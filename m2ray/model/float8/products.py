"""FP8 rows times FP8 weights: by a kernel on a GPU that has FP8, by torch alone on a CPU. For torch.compile one operation."""

import torch

from m2ray.model.float8 import twin
from m2ray.model.float8.proof import kernel_for


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
