"""compressed-tensors `pack-quantized`: whole numbers of 4 or 8 bits in int32 words along a row, with a scale a group, row or tensor.

As compressed-tensors 0.20 computes it (`PackedQuantizationCompressor`).
"""

import torch

from m2ray.model.quantization.int4 import scaled, unpack_words


def unpack(
    packed: torch.Tensor,
    scale: torch.Tensor,
    columns: int,
    *,
    bits: int = 4,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, columns] in the dtype of `scale`.

    Args:
        packed: `weight_packed`, int32 [rows, words], contiguous; a row's last word may not be full.
        scale: `weight_scale`, [rows, groups], [rows, 1] or one number.
        columns: of the weight, a multiple of the groups.
        bits: 4 or 8 a number, stored with half of its range added.
        zero_point: `weight_zero_point`, int32 [ceil(rows * bits / 32), groups], packed along the rows; None where they are all 0.
    """
    numbers, groups = unpack_words(packed, bits)[..., :columns], scale.shape[-1] if scale.dim() > 1 else 1
    middle = 1 << (bits - 1)
    zeros: torch.Tensor | int = middle
    if zero_point is not None:
        zeros = unpack_words(zero_point.t().contiguous(), bits).t()[: numbers.shape[0]].unsqueeze(-1)
    grouped = numbers.unflatten(-1, (groups, -1))
    return scaled(grouped, zeros, scale.reshape(-1, groups).unsqueeze(-1)).flatten(-2)
