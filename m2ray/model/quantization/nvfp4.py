"""NVFP4: FP4 codes, an e4m3 scale for every 16 of them, and one float32 scale a tensor."""

import torch

from m2ray.model.quantization.fp4 import unpack_e2m1

GROUP = 16
"""Values a scale."""


def unpack_modelopt(packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]: value * (scale * tensor_scale) in float32, rounded once. Code 8 is 0.0.

    As nvidia-modelopt 0.47 computes it (`NVFP4QTensor.dequantize`).

    Args:
        packed: two codes a byte, uint8 [..., columns / 2], contiguous: `weight`.
        scale: float8_e4m3fn [..., columns / 16]: `weight_scale`.
        tensor_scale: float32, one number: `weight_scale_2`.
    """
    return _scaled(unpack_e2m1(packed, negative_zero=False), scale.float() * tensor_scale.reshape(()))


def unpack_compressed(packed: torch.Tensor, scale: torch.Tensor, tensor_divisor: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]: value * (scale / tensor_divisor) in float32, rounded once.

    As compressed-tensors 0.20 computes it (`nvfp4-pack-quantized`).

    Args:
        packed: two codes a byte, uint8 [..., columns / 2], contiguous: `weight_packed`.
        scale: float8_e4m3fn [..., columns / 16]: `weight_scale`.
        tensor_divisor: float32, one number: `weight_global_scale`.
    """
    return _scaled(unpack_e2m1(packed), scale.float() / tensor_divisor.reshape(()))


def _scaled(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Each group of `values` [..., columns] times its factor, in float32."""
    grouped = values.float().unflatten(-1, (-1, GROUP))
    return grouped.mul_(factors.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
