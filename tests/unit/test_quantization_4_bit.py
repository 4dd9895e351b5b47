"""The 4-bit layouts, value by value as each format's documentation has it; MXFP4 also against transformers' own. scripts/layouts has the rest."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from m2ray.model.quantization import awq, gptq, mxfp4, nibbles, nvfp4, pack_quantized
from tests.layouts.codes import random_bytes, random_e4m3, random_exponents, random_scales, random_words, same_bits

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def nibble(words: torch.Tensor, number: int) -> int:
    """The number-th four bits of a row of int32 words or of bytes, lowest first."""
    return int.from_bytes(words.contiguous().numpy().tobytes(), "little") >> 4 * number & 15


def filled(rows: int, columns: int, dtype: torch.dtype, value_at) -> torch.Tensor:
    """[rows, columns], each float32 value rounded once to `dtype`."""
    values = [[value_at(row, column) for column in range(columns)] for row in range(rows)]
    return torch.stack([torch.stack(row) for row in values]).to(dtype)


def test_nvfp4_of_modelopt_and_of_compressed_tensors() -> None:
    packed, scale, factor = random_bytes(3, 24), random_e4m3(3, 3), torch.tensor([0.0173])
    codes = [[E2M1[nibble(row, column)] for column in range(48)] for row in packed]
    at = scale.float()
    multiplied = filled(3, 48, torch.bfloat16, lambda row, column: codes[row][column] * (at[row, column // 16] * factor[0]))
    divided = filled(3, 48, torch.bfloat16, lambda row, column: codes[row][column] * (at[row, column // 16] / factor[0]))
    assert same_bits(nvfp4.unpack_modelopt(packed, scale, factor[0]), multiplied + 0.0)  # it has no -0.0
    assert same_bits(nvfp4.unpack_compressed(packed, scale, factor), divided)
    assert not torch.equal(multiplied, divided)


@pytest.mark.parametrize("every_scale", [False, True])
def test_mxfp4_is_transformers_for_gpt_oss(every_scale) -> None:
    scales = torch.arange(255, dtype=torch.uint8).reshape(3, 17, 5) if every_scale else random_exponents(2, 6, 3)
    blocks = random_bytes(*scales.shape, 16)
    unpacked = mxfp4.unpack_parts({"values": blocks, "scale": scales}).transpose(1, 2)
    assert same_bits(unpacked, convert_moe_packed_tensors(blocks, scales))


def test_a_scale_that_is_no_number_makes_none() -> None:
    """255 is none (OCP MX 1.0). transformers takes it for 2^128: all but 0 and 0.5 of gpt-oss's group are infinite there too."""
    blocks, scales = random_bytes(1, 1, 2, 16), torch.tensor([[[120, 255]]], dtype=torch.uint8)
    first, damaged = mxfp4.unpack_parts({"values": blocks, "scale": scales}).split(32, -1)
    assert first.isfinite().all()
    assert not damaged.isfinite().any()
    theirs = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)[..., 32:]
    assert same_bits(damaged[theirs.isinf()], theirs[theirs.isinf()])


@pytest.mark.parametrize("every_scale", [False, True])
def test_mxfp4_is_transformers_for_deepseek_v4(every_scale) -> None:
    scales = torch.arange(256, dtype=torch.uint8).reshape(-1, 4) if every_scale else random_exponents(8, 3)
    scales, packed = scales.view(torch.float8_e8m0fnu), random_bytes(len(scales), 16 * scales.shape[1]).view(torch.int8)
    theirs, unpacked = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16), mxfp4.unpack(packed, scales)
    assert same_bits(unpacked.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(unpacked.isnan(), theirs.isnan())  # 255 is none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(11, 64, 2), (3, 13, 1)])
def test_pack_quantized(rows, columns, groups, dtype) -> None:
    words, scale = random_words(rows, -(-columns // 8)), random_scales(rows, groups).to(dtype)
    zeros = random_words(-(-rows // 8), groups)

    def value(row: int, column: int, zero: int) -> torch.Tensor:
        return (nibble(words[row], column) - zero) * scale[row, column * groups // columns]

    symmetric = filled(rows, columns, dtype, lambda row, column: value(row, column, 8))
    shifted = filled(rows, columns, dtype, lambda row, column: value(row, column, nibble(zeros[:, column * groups // columns], row)))
    assert same_bits(pack_quantized.unpack(words, scale, columns), symmetric)
    assert same_bits(pack_quantized.unpack(words, scale, columns, zero_point=zeros), shifted)


def test_pack_quantized_of_eight_bits() -> None:
    words, scale = random_words(5, 4), random_scales(5, 1).bfloat16()
    expected = (words.view(torch.uint8).float() - 128) * scale.float()
    assert same_bits(pack_quantized.unpack(words, scale, 15, bits=8), expected[:, :15].bfloat16())


def test_awq() -> None:
    words, zeros, scales = random_words(32, 3), random_words(2, 3), random_scales(2, 24).half()
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # of output features 0 to 7 in their word

    def value(row: int, column: int) -> torch.Tensor:
        at, group = 8 * (row // 8) + place[row % 8], column // 16
        return (nibble(words[column], at) - nibble(zeros[group], at)) * scales[group, row]

    assert same_bits(awq.unpack(words, zeros, scales), filled(24, 32, torch.float16, value))


@pytest.mark.parametrize("zeros_one_less", [True, False])
def test_gptq_in_an_order_of_its_own(zeros_one_less) -> None:
    words, scales = random_words(4, 16), random_scales(2, 16).half()
    zeros = torch.randint(1, 16, (2, 16))
    stored = zeros - 1 if zeros_one_less else zeros
    packed = torch.tensor(
        [[sum(int(stored[group, 8 * word + at]) << 4 * at for at in range(8)) for word in range(2)] for group in range(2)]
    )
    g_idx = torch.tensor([0, 1, 1, 0] * 8, dtype=torch.int32)

    def value(row: int, column: int) -> torch.Tensor:
        return (nibble(words[:, row], column) - int(zeros[g_idx[column], row])) * scales[g_idx[column], row]

    unpacked = gptq.unpack(words, packed.to(torch.uint32).view(torch.int32), scales, g_idx, zeros_one_less=zeros_one_less)
    assert same_bits(unpacked, filled(16, 32, torch.float16, value))


@pytest.mark.parametrize("values", [1, 100, 1000])
def test_a_few_rows_at_a_time_are_the_same(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scale, factors = random_bytes(2, 5, 48), random_exponents(2, 5, 3), random_e4m3(2, 5, 6)
    words, zeros, scales = random_words(6, 16), random_words(3, 2), random_scales(3, 16).half()
    g_idx = torch.randperm(48).int() // 16

    def unpacked() -> list[torch.Tensor]:
        return [
            mxfp4.unpack(packed, scale),
            nvfp4.unpack_modelopt(packed, factors, torch.tensor(0.01)),
            gptq.unpack(words, zeros, scales, g_idx),
        ]

    at_once = unpacked()
    monkeypatch.setattr(nibbles, "CPU_VALUES", values)
    assert all(same_bits(one, other) for one, other in zip(unpacked(), at_once, strict=True))
