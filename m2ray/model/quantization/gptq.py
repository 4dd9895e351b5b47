"""GPTQ, 4 bits: int32 words of eight numbers along the input features, and for each input feature the number of its group.

As gptqmodel 7.7 computes it (`TorchLinear.dequantize_weight`).
"""

import torch

from m2ray.model.quantization.int4 import scaled, unpack_words

ONE_LESS = 0x11111111
"""What the format "gptq" took from each word of zero points, and "gptq_v2" does not. A borrow goes from one number to the next."""


def unpack(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, zeros_one_less: bool = True
) -> torch.Tensor:
    """A linear layer's weight, a view, [out_features, in_features] in the dtype of `scales`, float16.

    Args:
        qweight: int32 [in_features / 8, out_features].
        qzeros: int32 [groups, out_features / 8].
        scales: float16 [groups, out_features].
        g_idx: int32 [in_features], each input feature's group, in any order.
        zeros_one_less: whether `qzeros` are one less than the zero points, as `checkpoint_format` "gptq" has them.
    """
    numbers = unpack_words(qweight.t().contiguous()).t()
    zeros = unpack_words(qzeros + ONE_LESS if zeros_one_less else qzeros)
    groups = g_idx.long()
    return scaled(numbers, zeros[groups], scales[groups]).t()
