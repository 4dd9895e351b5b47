"""compressed-tensors: what its own compressors pack, and random codes under random scales, unpack to its bits."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers import AutoConfig, AutoModelForCausalLM

from m2ray.model.quantization import mxfp4, nvfp4, pack_quantized
from tests.layouts.codes import random_bytes, random_e4m3, random_scales, random_words, same_bits
from tests.packed import make_packed
from tests.reference import chain_rows, load_chain, micro_batch_of, reference_rows

WHOLE_NUMBERS = {"num_bits": 4, "type": "int"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}


def scheme(**weights) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def theirs(layout: str, tensors, how: QuantizationScheme) -> torch.Tensor:
    return BaseCompressor.get_value_from_registry(layout).decompress(dict(tensors), how)["weight"]


def ours(tensors, columns: int, bits: int = 4) -> torch.Tensor:
    return pack_quantized.unpack(
        tensors["weight_packed"], tensors["weight_scale"], columns, bits=bits, zero_point=tensors.get("weight_zero_point")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 128, 32), (13, 96, 32), (7, 40, None), (5, 13, None)])
def test_pack_quantized(rows, columns, group, bits, symmetric, dtype) -> None:
    how = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    how |= {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    groups = 1 if group is None else columns // group
    tensors = {
        "weight_packed": random_words(rows, -(-columns * bits // 32)),
        "weight_scale": random_scales(rows, groups).to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = random_words(-(-rows * bits // 32), groups)
    assert same_bits(ours(tensors, columns, bits), theirs("pack-quantized", tensors, scheme(**how)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [24, 13])
def test_what_its_packer_writes(rows, symmetric) -> None:
    how = scheme(num_bits=4, type="int", strategy="group", group_size=32, symmetric=symmetric)
    weight, scale = torch.randn(rows, 96).bfloat16(), random_scales(rows, 3).bfloat16()
    zero_point = torch.zeros(rows, 3, dtype=torch.int8) if symmetric else torch.randint(-8, 8, (rows, 3), dtype=torch.int8)
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = packer.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}, how)
    assert same_bits(ours(packed, 96), theirs("pack-quantized", packed, how))


@pytest.mark.parametrize("columns", [64, 48])
def test_nvfp4(columns) -> None:
    how = scheme(**FP4, strategy="tensor_group", group_size=16)
    tensors = {
        "weight_packed": random_bytes(9, columns // 2),
        "weight_scale": random_e4m3(9, columns // 16),
        "weight_global_scale": torch.tensor([1234.5]),
    }
    unpacked = nvfp4.unpack_compressed(tensors["weight_packed"], tensors["weight_scale"], tensors["weight_global_scale"])
    assert same_bits(unpacked, theirs("nvfp4-pack-quantized", tensors, how))


def test_mxfp4_of_every_scale() -> None:
    how = scheme(**FP4, strategy="group", group_size=32, scale_dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8).reshape(-1, 2)
    tensors = {"weight_packed": random_bytes(len(scales), 32), "weight_scale": scales}
    assert same_bits(mxfp4.unpack(*tensors.values()), theirs("mxfp4-pack-quantized", tensors, how))


@pytest.mark.parametrize(
    ("family", "fmt"),
    [
        *(("llama", fmt) for fmt in ("pack-quantized", "pack-quantized-asymmetric", "nvfp4-pack-quantized", "mxfp4-pack-quantized")),
        *(("llama", fmt) for fmt in ("float-quantized", "float-quantized-tensor", "float-quantized-block", "int-quantized")),
        *((family, "pack-quantized") for family in ("qwen3_moe", "deepseek_v3", "glm4_moe")),
    ],
)
def test_rows_are_those_of_transformers_with_this_library(family, fmt, tmp_path) -> None:
    folder = make_packed(tmp_path / "packed", family, fmt)
    micro_batch = micro_batch_of((9, 5, 1), 96)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    expected = reference_rows(AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16).eval(), micro_batch)
    for bounds in ((0, 3), (0, 1, 3)):
        ours = chain_rows(load_chain(folder, bounds, "bfloat16"), micro_batch)
        assert all(same_bits(one, other) for one, other in zip(ours, expected, strict=True))
