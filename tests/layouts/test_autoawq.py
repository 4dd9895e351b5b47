"""autoawq: what its own layer packs, and random words, unpack to the bits of its plain dequantisation."""

import pytest
import torch
from awq.utils.packing_utils import dequantize_gemm

from m2ray.model.quantization import awq
from tests.layouts.codes import random_scales, random_words, same_bits


@pytest.mark.parametrize(("columns", "rows", "group"), [(128, 24, 32), (96, 40, 96)])
def test_random_words(columns, rows, group) -> None:
    groups = columns // group
    stored = random_words(columns, rows // 8), random_words(groups, rows // 8), random_scales(groups, rows).half()
    assert same_bits(awq.unpack(*stored), dequantize_gemm(*stored, 4, group).t())


def test_what_its_packer_writes() -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM

    linear, scales, zeros = torch.nn.Linear(64, 32, bias=False), random_scales(2, 32).half(), torch.randint(0, 16, (2, 32))
    numbers = torch.randint(0, 16, (64, 32))
    linear.weight.data = ((numbers - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)).t().float()
    layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales, zeros=zeros)
    expected = ((numbers - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)).t()
    assert same_bits(awq.unpack(layer.qweight, layer.qzeros, layer.scales), expected)
