"""MXFP4: FP4 codes, and for every 32 of them one scale that is a power of two."""

import torch

from m2ray.model.quantization.fp4 import power_of_two, unpack_e2m1

GROUP = 32
"""Values a scale."""


def unpack(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]. The product of an FP4 value and a power of two is exact, but for the smallest and largest scales.

    As transformers 5.24 (`Fp8Dequantize`, for DeepSeek-V4's experts) and compressed-tensors 0.20 (`mxfp4-pack-quantized`) compute it.

    Args:
        packed: two codes a byte, [..., columns / 2], contiguous.
        scale: uint8 or float8_e8m0fnu [..., columns / 32].
    """
    values = unpack_e2m1(packed).unflatten(-1, (-1, GROUP))
    return values.mul_(power_of_two(scale).to(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def unpack_experts(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """gpt-oss's experts as the model has them, a view, bfloat16 [experts, columns, rows]: on disk each is transposed.

    As transformers 5.24 computes it (`Mxfp4Dequantize`).

    Args:
        blocks: uint8 [experts, rows, groups, 16].
        scales: uint8 [experts, rows, groups].
    """
    return unpack(blocks.flatten(-2), scales).transpose(-2, -1)
