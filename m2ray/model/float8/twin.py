"""Products of FP8 rows and weights by torch alone: what the kernel stands for. Slow, and on any device."""

import torch
from torch.nn.functional import silu

from m2ray.model.float8.rounding import BLOCK, round_rows


def multiply(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor | None,
    take: torch.Tensor | None,
    put: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As `m2ray.model.float8.products.multiply`, but for `dtype`, in which the products of a block are summed, and that of the result.

    Each sum of 128 products is made apart, times both scales, and added to those before it.
    """
    taken, scales = (rows, row_scales) if take is None else (rows[take], row_scales[take])
    out = torch.empty(len(taken), weight.shape[1], dtype=dtype, device=rows.device)
    begin = 0
    for number, end in enumerate([len(taken)] if ends is None else ends.tolist()):
        out[begin:end] = _one(taken[begin:end], scales[begin:end], weight[number], weight_scales[number], dtype)
        begin = end
    if put is None:
        return out
    placed = torch.empty_like(out)
    placed[put] = out
    return placed


def multiply_gated(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `m2ray.model.float8.products.multiply_gated`."""
    return gated(multiply(rows, row_scales, weight, weight_scales, ends, None, None).to(torch.bfloat16))


def gated(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of both, one behind the other in bfloat16 [N, 2 I], as FP8 with scales."""
    gate, up = both.float().chunk(2, dim=1)
    rows: tuple[torch.Tensor, torch.Tensor] = round_rows(silu(gate) * up)
    return rows


def _one(
    rows_NK: torch.Tensor, scales: torch.Tensor, weight_OK: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows times one weight, [N, O]."""
    total = torch.zeros(len(rows_NK), len(weight_OK), dtype=dtype, device=rows_NK.device)
    by_column = weight_scales.to(dtype).repeat_interleave(BLOCK, 0)[: len(weight_OK)]
    for block in range(rows_NK.shape[1] // BLOCK):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        products = rows_NK[:, columns].to(dtype) @ weight_OK[:, columns].to(dtype).T
        total += products * (scales[:, block, None].to(dtype) * by_column[:, block])
    return total
