"""Which of a configuration's layouts a weight is read as, and which modules it names: by patterns that strangers write."""

import json
import random
import re
import time
from typing import Any

import pytest
import torch

from m2ray.errors import CheckpointError
from m2ray.model.families import parse_config
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization import skipped
from m2ray.model.quantization.layouts import LAYOUTS
from m2ray.model.quantization.stored import StoredTensor
from m2ray.model.tensor_table import table_without_weights
from tests.reference import DATA

X = "model.layers.0.self_attn.q_proj"


def _group(target: str, bits: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, **more}
    return {"targets": [target], "format": "pack-quantized", "weights": weights}


def _compressed(*groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}


def _header(dtype: torch.dtype, *shape: int) -> TensorHeader:
    return TensorHeader("a.safetensors", dtype, shape, 0, torch.Size(shape).numel() * dtype.itemsize)


def _stored(says: dict[str, Any], module: str = X, **parts: TensorHeader) -> StoredTensor:
    headers = {f"{module}.{name}": header for name, header in parts.items()}
    return LAYOUTS[says["quant_method"]](says).stored(headers)[f"{module}.weight"]


INT4 = {
    "weight_packed": _header(torch.int32, 16, 8),
    "weight_scale": _header(torch.bfloat16, 16, 2),
    "weight_shape": _header(torch.int64, 2),
}
INT8 = {**INT4, "weight_packed": _header(torch.int32, 16, 16)}


def test_weights_of_one_form_are_stored_as_each_alone() -> None:
    """The first of a form is looked at, the others are as it is, but for their names and places; one that is otherwise says so."""
    layout = LAYOUTS["compressed-tensors"](_compressed(_group("Linear", 4)))
    fine, spoilt = (f"model.layers.0.mlp.experts.{number}.up_proj" for number in ("{}", "2"))
    headers = {
        f"{fine.format(expert)}.{name}": header._replace(offset=1000 * expert)
        for expert in (0, 1, 2, 3)
        for name, header in INT4.items()
        if (expert, name) != (2, "weight_scale")
    }
    together = layout.stored(headers)
    for expert in (0, 1, 3):
        module = fine.format(expert)
        alone = layout.stored({key: header for key, header in headers.items() if key.startswith(module)})
        assert together[f"{module}.weight"] == alone[f"{module}.weight"]
        assert [part.header.offset for part in together[f"{module}.weight"].parts] == [1000 * expert] * 3
    assert f"{spoilt}.weight_scale is missing" in str(together[f"{spoilt}.weight"].problems)


@pytest.mark.parametrize(
    "says",
    [_compressed(_group("Linear", 8), _group("re:.*self_attn.*", 4)), _compressed(_group("re:.*self_attn.*", 4), _group("Linear", 8))],
)
def test_a_weight_is_read_as_the_group_that_names_it(says: dict[str, Any]) -> None:
    attention, mlp = _stored(says, **INT4), _stored(says, "model.layers.0.mlp.up_proj", **INT8)
    assert not attention.problems
    assert not mlp.problems
    assert (attention.method[:4], mlp.method[:4]) == ("INT4", "INT8")
    assert attention.shape == mlp.shape == (16, 64)


def test_zero_points_that_are_gone_are_missed_where_another_group_has_none() -> None:
    says = _compressed(_group("Linear", 4), _group("re:.*self_attn.*", 4, symmetric=False))
    assert f"{X}.weight_zero_point is missing" in str(_stored(says, **INT4).problems)


def test_a_weight_that_no_group_names_is_what_its_parts_fit() -> None:
    says = _compressed(_group("re:.*mlp.*", 4), _group("re:.*experts.*", 4, symmetric=False))
    assert not _stored(says, **INT4, weight_zero_point=_header(torch.int32, 2, 2)).problems


def test_a_strategy_left_out_follows_from_the_size_of_groups() -> None:
    for group, scale in ((32, (16, 2)), (-1, (16, 1)), (None, (1,))):
        says = _compressed(_group("Linear", 4, strategy=None, group_size=group))
        assert not _stored(says, **{**INT4, "weight_scale": _header(torch.bfloat16, *scale)}).problems


@pytest.mark.parametrize("scale", [(), (1,), (200, 1), (2, 3)])
def test_fp8_that_does_not_say_its_blocks(scale: tuple[int, ...]) -> None:
    stored = _stored({"quant_method": "fp8"}, weight=_header(torch.float8_e4m3fn, 200, 300), weight_scale=_header(torch.float32, *scale))
    assert not stored.problems


def test_a_block_is_no_larger_than_its_weight() -> None:
    says = {"quant_method": "fp8", "weight_block_size": [10**30, 10**30]}
    stored = _stored(says, weight=_header(torch.float8_e4m3fn, 20, 30), weight_scale=_header(torch.float32, 1, 1))
    assert stored.unpack.block == (20, 30)  # type: ignore[union-attr] - it is a ScaledUnpack


@pytest.mark.parametrize(
    ("says", "parts", "needed"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 48, "version": "gemm"},
            {"qweight": _header(torch.int32, 64, 2), "qzeros": _header(torch.int32, 2, 2), "scales": _header(torch.float16, 2, 16)},
            [8, 48],
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {
                "weight": _header(torch.uint8, 4, 12),
                "weight_scale": _header(torch.float8_e4m3fn, 4, 2),
                "weight_scale_2": _header(torch.float32),
            },
            [1, 16],
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64},
            {
                "qweight": _header(torch.int32, 8, 20),
                "qzeros": _header(torch.int32, 1, 2),
                "scales": _header(torch.float16, 1, 20),
                "g_idx": _header(torch.int32, 64),
            },
            [8, 8],
        ),
    ],
)
def test_sides_that_groups_do_not_divide(says: dict[str, Any], parts: dict[str, TensorHeader], needed: list[int]) -> None:
    assert f"needs sides that {needed} divide" in str(_stored(says, **parts).problems)


def test_a_pattern_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipped, "MATCHING_S", 0.05)
    is_named = skipped.by_compressed_tensors(["re:(q|q|qq)+p"])
    assert is_named("qqp")
    with pytest.raises(CheckpointError, match=r"\(q\|q\|qq\)\+p', which takes too long"):
        is_named("q" * 60)


def test_experts_that_the_configuration_names_one_by_one_are_planned_as_it_packs_them() -> None:
    fields = json.loads((DATA / "families" / "qwen3_moe.json").read_text())
    names = [f"model.layers.0.mlp.experts.{number}.{end}_proj" for number in range(8) for end in ("gate", "up", "down")]
    fields["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names},
    }
    rows = {row.name: row for row in table_without_weights(parse_config(json.dumps(fields).encode())).rows}
    packed = 8 * 3 * (48 * 32 // 2 + 48 * 32 // 16 + 4)
    experts = [row for name, row in rows.items() if name.startswith("model.layers.0.mlp.experts.")]
    assert sum(row.disk_bytes for row in experts) == packed
    assert sum(row.disk_bytes for name, row in rows.items() if name.startswith("model.layers.2.mlp.experts.")) == 8 * 3 * 48 * 32 * 2


def test_hundreds_of_plain_names_are_matched_as_one_by_one_and_in_a_moment() -> None:
    """Qwen3-30B-A3B-FP8 leaves 145 modules out by name, and has 37,000."""
    draw = random.Random(4)

    def name() -> str:
        return ".".join(draw.choice(("a", "b1", "ab", "1", "x_y")) for _ in range(draw.randint(1, 4)))

    for _ in range(2000):
        names = [draw.choice((name(), f"{name()}.", name()[:2], rf"{name()}\.\d", f"{name()}|a", "")) for _ in range(draw.randint(0, 4))]
        patterns = [re.compile(rf"(?:{each})(?:(?<=\.)|(?=\.|$))") for each in names]
        is_named, module = skipped.by_transformers(names), name()
        expected = any(module.endswith(each) or f".{each}." in f".{module}." for each in names)
        assert is_named(module) == (expected or any(pattern.match(module) for pattern in patterns)), (names, module)

    is_named = skipped.by_transformers([f"model.layers.{layer}.mlp.gate" for layer in range(1000)])
    began_s = time.thread_time()
    assert not any(is_named(f"model.layers.{number % 48}.mlp.experts.{number}.up_proj") for number in range(2000))
    assert time.thread_time() - began_s < 2, "one by one it takes 5 s"
