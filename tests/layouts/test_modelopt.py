"""NVIDIA ModelOpt: NVFP4 that its own class quantised, and random codes under random scales, unpack to its bits."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from m2ray.model.quantization import nvfp4
from tests.layouts.codes import random_bytes, random_e4m3, same_bits


def theirs(packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    tensor = NVFP4QTensor(shape, torch.bfloat16, packed)
    return tensor.dequantize(scale=scale, double_scale=tensor_scale, block_sizes={-1: 16})


@pytest.mark.parametrize("columns", [64, 48])
@pytest.mark.parametrize("tensor_scale", [torch.tensor(0.00123), torch.tensor([1.7e-5])])
def test_random_codes(columns, tensor_scale) -> None:
    stored = random_bytes(9, columns // 2), random_e4m3(9, columns // 16), tensor_scale
    assert same_bits(nvfp4.unpack_modelopt(*stored), theirs(*stored))


def test_what_it_quantised() -> None:
    weight = torch.randn(32, 96).bfloat16()
    tensor, scale, tensor_scale = NVFP4QTensor.quantize(weight, 16)
    stored = tensor._quantized_data, scale, tensor_scale
    assert same_bits(nvfp4.unpack_modelopt(*stored), theirs(*stored))
    assert (nvfp4.unpack_modelopt(*stored) - weight).abs().max() < 1
