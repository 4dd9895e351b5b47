"""gptqmodel: what its own layer packs, and random words, unpack to the bits that this layer multiplies with."""

import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

from m2ray.model.quantization import gptq
from tests.layouts.codes import random_scales, random_words, same_bits


def layer_of(columns: int, rows: int, group: int) -> TorchLinear:
    return TorchLinear(bits=4, group_size=group, sym=False, desc_act=True, in_features=columns, out_features=rows, bias=False)


@pytest.mark.parametrize("zeros_one_less", [True, False])
@pytest.mark.parametrize(("columns", "rows", "group"), [(128, 64, 32), (96, 32, 96)])
def test_random_words(columns, rows, group, zeros_one_less) -> None:
    groups = columns // group
    g_idx = torch.arange(columns)[torch.randperm(columns)].int() // group
    stored = random_words(columns // 8, rows), random_words(groups, rows // 8), random_scales(groups, rows).half(), g_idx
    layer = layer_of(columns, rows, group)
    for name, tensor in zip(("qweight", "qzeros", "scales", "g_idx"), stored, strict=True):
        getattr(layer, name).data = tensor.clone()
    if zeros_one_less:
        convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)
    layer.post_init()
    plain = TorchLinear.dequantize_weight(layer)  # the layer's own has been compiled, for which a C++ compiler takes minutes
    assert same_bits(gptq.unpack(*stored, zeros_one_less=zeros_one_less), plain.t())


def test_what_its_packer_writes() -> None:
    columns, rows, group = 64, 32, 32
    layer, linear = layer_of(columns, rows, group), torch.nn.Linear(columns, rows, bias=False)
    g_idx = torch.arange(columns)[torch.randperm(columns)].int() // group
    scales, zeros = random_scales(rows, columns // group).half(), torch.randint(0, 16, (rows, columns // group))
    numbers = torch.randint(0, 16, (rows, columns))
    weight = (numbers - zeros[:, g_idx.long()]) * scales[:, g_idx.long()]
    linear.weight.data = weight.float()
    layer.pack_original(linear, scales, zeros, g_idx)  # its other packers compile code for minutes first
    stored = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
    assert same_bits(gptq.unpack(*stored, zeros_one_less=False), weight)
