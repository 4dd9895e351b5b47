"""FP8 and int8 under every name: values against transformers' own or the library's formula, what a layout reads and leaves, what is refused."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from m2ray.batches import LayerSpan
from m2ray.cli.plan_inputs import read_model
from m2ray.errors import CheckpointError
from m2ray.model import pieces
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization import scaling
from m2ray.model.quantization.layout import Layout
from m2ray.model.quantization.layouts import WAYS_OUT, layout_of
from m2ray.model.quantization.scaling import ScaledUnpack, dequantize
from m2ray.model.stage import StageSpec, load_stage
from m2ray.model.tensor_table import table_without_weights, tensor_table
from m2ray.model.weights import hash_weights
from scripts.checkpoint_formats.table import FORMATS
from tests.packed import make_packed
from tests.reference import DATA, load_span, same_bits

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BF16, F16, F32, U8, I8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8

LLAMA = json.loads((DATA / "families" / "llama.json").read_text())
KEY = "model.layers.1.mlp.up_proj.weight"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}


def random_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=U8)
    bits[bits.view(dtype).float().isnan()] = 0
    return bits.view(dtype)


def random_scales(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if dtype.itemsize == 1:
        return torch.randint(100, 140, shape, generator=generator, dtype=U8).view(dtype)
    return (torch.rand(shape, generator=generator) * 1e-2).to(dtype)


GRIDS: list[tuple[tuple[int, ...], tuple[int, int] | None]] = [
    ((), None),
    ((1,), None),
    ((6, 1), (1, 64)),
    ((2, 4), (3, 16)),
    ((6, 2), (1, 32)),
]


@pytest.mark.parametrize(("dtype", "cached"), [(E4M3, 70), (E4M3, 140), (E5M2, 1 << 18)])
@pytest.mark.parametrize("scale_dtype", [F32, BF16, F16, U8, E8M0])
@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_scales_of_every_kind_are_transformers(
    grid: tuple[int, ...],
    block: tuple[int, int] | None,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    cached: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "_ELEMENTS_AT_ONCE", cached)
    values, scales = random_values((6, 64), dtype), random_scales(grid, scale_dtype)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales.reshape(scales.shape or (1, 1)), BF16)
    assert same_bits(dequantize(values, scales, block), expected)


def test_exponents_of_two_from_the_smallest_to_none() -> None:
    scales, values = torch.arange(256, dtype=U8).view(-1, 1), random_values((256, 32), E4M3)
    for dtype in (U8, E8M0):
        expected = Fp8Dequantize(None)._dequantize_one(values, scales.view(dtype), BF16)
        found = dequantize(values, scales.view(dtype), (1, 32))
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [E4M3, I8])
@pytest.mark.parametrize("scale_dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("grid", "block"), [((1,), None), ((5, 1), (1, 48))])
def test_compressed_tensors_multiplies_in_the_scales_dtype(
    grid: tuple[int, ...], block: tuple[int, int] | None, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """compressed-tensors 0.20, quantization/lifecycle/forward_helpers.py, _dequantize: x_q.to(scale.dtype) * scale."""
    values, scales = random_values((5, 48), dtype), random_scales(grid, scale_dtype)
    expected = (values.to(scale_dtype) * scales).to(BF16)
    assert same_bits(ScaledUnpack(block, in_scale_dtype=True)({"values": values, "scale": scales}), expected)


def test_each_expert_has_its_own_scale() -> None:
    values, scales = random_values((3, 4, 10), E4M3), random_scales((3,), F32)
    expected = (values.float() * scales.view(3, 1, 1)).to(BF16)
    found = layout(STATIC).stored(headers({"e": (E4M3, (3, 4, 10)), "e_scale": (F32, (3,))}))["e"]
    assert not found.problems
    assert found.unpack is not None
    assert same_bits(found.unpack({"values": values, "scale": scales}), expected)


@pytest.mark.parametrize(("shape", "grid", "block"), [((6, 64), (2, 4), (3, 16)), ((6, 64), (), None), ((2, 6, 64), (2, 2, 4), (3, 16))])
def test_values_are_written_where_axes_are_swapped(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> None:
    parts = {"values": random_values(shape, E4M3), "scale": random_scales(grid, F32)}
    into = torch.zeros(*shape[:-2], shape[-1], shape[-2] + 2, dtype=BF16)
    ScaledUnpack(block).write(parts, into[..., 1:-1].transpose(-1, -2))
    assert same_bits(into[..., 1:-1].transpose(-1, -2).contiguous(), ScaledUnpack(block)(parts))
    assert not into[..., 0].any()
    assert not into[..., -1].any()


def config(quantised: Any, **fields: Any) -> Any:
    return parse_config(json.dumps({**LLAMA, **fields, "quantization_config": quantised}).encode())


def layout(quantised: Any) -> Layout:
    return layout_of(config(quantised))


def headers(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, TensorHeader]:
    return {key: TensorHeader("f", dtype, shape, 0, dtype.itemsize * torch.Size(shape).numel()) for key, (dtype, shape) in tensors.items()}


def compressed(kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    said = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": said}},
    }


NAMES = [
    (BLOCKS, "_scale_inv", E4M3, F32, (2, 1)),
    ({**BLOCKS, "scale_fmt": "ue8m0"}, "_scale_inv", E4M3, F32, (2, 1)),
    ({**BLOCKS, "scale_fmt": "ue8m0"}, ".scale", E4M3, E8M0, (2, 1)),
    (STATIC, ".qscale_weight", E4M3, BF16, ()),
    (STATIC, "_scale", E4M3, F32, (1,)),
    (STATIC, "_scale_inv", E4M3, F32, (200, 1)),
    ({"quant_method": "mxfp8"}, "_scale_inv", E4M3, U8, (200, 4)),
    ({"quant_method": "fbgemm_fp8"}, "_scale", E4M3, F32, (200, 1)),
    (compressed("float", "tensor"), "_scale", E4M3, BF16, (1,)),
    (compressed("float", "channel"), "_scale", E4M3, BF16, (200, 1)),
    (compressed("float", "block", block_structure=[128, 128]), "_scale", E4M3, BF16, (2, 1)),
    (compressed("int", "channel"), "_scale", I8, BF16, (200, 1)),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", E4M3, F32, ()),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "_scale", E4M3, F32, (200,)),
    ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "_scale", E4M3, U8, (200, 4)),
]


@pytest.mark.parametrize(("quantised", "ending", "dtype", "scale_dtype", "grid"), NAMES)
def test_a_weight_and_its_scales_are_one_tensor(
    quantised: dict[str, Any], ending: str, dtype: torch.dtype, scale_dtype: torch.dtype, grid: tuple[int, ...]
) -> None:
    scale = KEY.removesuffix(".weight") + ending if ending.startswith(".") else KEY + ending
    on_disk = headers({KEY: (dtype, (200, 128)), scale: (scale_dtype, grid), "model.norm.weight": (BF16, (128,))})
    found = layout(quantised).stored(on_disk)
    assert found.keys() == {KEY, "model.norm.weight"}
    stored = found[KEY]
    assert not stored.problems
    assert [part.key for part in stored.parts] == [KEY, scale]
    assert stored.num_bytes == on_disk[KEY].num_bytes + on_disk[scale].num_bytes
    values, scales = random_values((200, 128), dtype), random_scales(grid, scale_dtype)
    factors = torch.exp2(scales.float() - 127) if scale_dtype == U8 else scales.float()
    if factors.numel() > 1:
        factors = factors.view(len(factors), -1)
        factors = factors.repeat_interleave(128 if len(factors) == 2 else 1, 0)[:200].repeat_interleave(128 // factors.shape[1], 1)
    assert stored.unpack is not None
    assert same_bits(stored.unpack({"values": values, "scale": scales}), (values.float() * factors).to(BF16))


def test_two_methods_that_the_configuration_names_meet_in_one_file() -> None:
    """Kimi-K2.6's: attention in FP8, experts in INT4."""
    said = compressed("float", "channel")
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    said["config_groups"]["experts"] = {"targets": ["re:.*experts.*"], "weights": int4, "format": "pack-quantized"}
    on_disk = {
        "a.weight": (E4M3, (200, 128)),
        "a.weight_scale": (BF16, (200, 1)),
        "e.weight_packed": (torch.int32, (200, 16)),
        "e.weight_scale": (BF16, (200, 4)),
        "e.weight_shape": (torch.int64, (2,)),
    }
    found = layout(said).stored(headers(on_disk))
    assert {key: (stored.shape, stored.problems) for key, stored in found.items()} == {
        "a.weight": ((200, 128), ()),
        "e.weight": ((200, 128), ()),
    }
    assert len({stored.method for stored in found.values()}) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEY: (E4M3, (200, 128))}, "is FP8, but its scales .*_scale_inv are missing"),
        ({KEY: (E4M3, (200, 128)), f"{KEY}_scale_inv": (F32, (1, 1))}, r"needs \[2, 1\] of"),
        ({KEY: (E4M3, (200, 128)), f"{KEY}_scale_inv": (U8, (2, 1))}, r"is torch.uint8 \[2, 1\]"),
        ({KEY: (E4M3, (200, 128)), f"{KEY}_scale_inv": (F32, (2, 1)), f"{KEY}_scale": (F32, (2, 1))}, "has no such part"),
        ({KEY: (I8, (200, 128)), f"{KEY}_scale": (F32, (2, 1))}, "a quantised layout that config.json does not name"),
        ({KEY: (BF16, (200, 128)), f"{KEY}_scale_inv": (F32, (2, 1))}, "is of dtype torch.bfloat16 and yet has scales"),
    ],
)
def test_what_no_method_reads_says_why(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], message: str) -> None:
    (problem,) = layout(BLOCKS).stored(headers(tensors))[KEY].problems
    with pytest.raises(CheckpointError, match=message):
        raise problem


@pytest.mark.parametrize("said_in_config", [{}, {"quantization_config": None}])
def test_what_modelopt_says_in_a_file_of_its_own_is_a_part_of_the_model(said_in_config: dict[str, None], tmp_path: Path) -> None:
    folder = make_packed(tmp_path / "model", "llama", "nvfp4-hf-quant")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | said_in_config))
    before = open_checkpoint(str(folder))
    assert [method.name for method in layout_of(before.whole_config).methods] == ["NVFP4 in groups of 16"]
    said = json.loads((folder / "hf_quant_config.json").read_text())
    said["quantization"]["kv_cache_quant_algo"] = "none of ours"
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    assert open_checkpoint(str(folder)).digest != before.digest
    (folder / "hf_quant_config.json").write_text('{"quantization": {}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json names no quant_algo"):
        open_checkpoint(str(folder))


REFUSED = [
    ({**BLOCKS, "scale_fmt": "log"}, "scale_fmt 'log'"),
    ({**BLOCKS, "expert_dtype": "fp2"}, "expert_dtype 'fp2'"),
    ({**BLOCKS, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert = 'lm_head' is no list of names"),
    ({**BLOCKS, "ignored_layers": ["model.(layers"]}, "has the pattern .*, which is none"),
    ({"quant_method": "mxfp8", "weight_block_size": [1, 16]}, r"mxfp8 with weight_block_size \[1, 16\]"),
    (compressed("int", "channel", symmetric=False), "int-quantized with symmetric = False"),
    (compressed("float", "channel", num_bits=6), "float-quantized with num_bits = 6"),
    (compressed("float", "token"), "strategy 'token'"),
    ({**compressed("float", "channel"), "format": "marlin-24"}, "format 'marlin-24'"),
    ({**compressed("float", "channel"), "transform_config": {"config_groups": {}}}, "rotated weights and activations"),
    ({**compressed("float", "channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
    *(({"quant_method": name}, f"quant_method '{name}', which m2ray does not read.*BF16") for name in WAYS_OUT),
]


@pytest.mark.parametrize(("quantised", "message"), REFUSED)
def test_half_known_layouts_are_refused_by_name(quantised: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        config(quantised)


PLANNED = [
    *product(["qwen3_moe"], sorted(FORMATS.keys() - {"mxfp4", "fp8-ue8m0"})),
    *product(("llama", "minimax_m2", "deepseek_v3", "glm4_moe"), ("mxfp8", "nvfp4-hf-quant")),
    ("gpt_oss", "mxfp4"),
]
"""Not those scales of FP8 that are exponents where config.json does not tell: without files they count as float32, which most have."""


@pytest.mark.parametrize(("family", "fmt"), PLANNED)
def test_a_plan_by_the_configuration_alone_counts_the_quantised_tensors_exactly(family: str, fmt: str, tmp_path: Path) -> None:
    folder = make_packed(tmp_path / "model", family, fmt)
    on_disk = {row.name: (row.disk_bytes, row.method) for row in tensor_table(open_checkpoint(str(folder))).rows if row.role == "layer"}
    (folder / "model.safetensors").unlink()
    planned = {row.name: (row.disk_bytes, row.method) for row in read_model(str(folder), "auto", "bfloat16").table.rows}
    differing = {name: (planned[name], found) for name, found in on_disk.items() if planned[name] != found}
    assert all(name.endswith(("gate.weight", "e_score_correction_bias")) for name in differing), differing  # float32 in some files
    assert any(method for _, method in on_disk.values())


def test_modules_that_are_left_as_they_were_count_so() -> None:
    skips = [
        ({**BLOCKS, "modules_to_not_convert": ["model.layers.0", "up_proj"]}, {"model.layers.1.mlp.down_proj.weight"}),
        (
            {**compressed("float", "channel"), "ignore": ["re:.*up_proj$", "model.layers.1.mlp.down_proj"]},
            {"model.layers.0.mlp.down_proj.weight"},
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*.up_proj", "model.layers.0*"]},
            {"model.layers.1.mlp.down_proj.weight"},
        ),
    ]
    for quantised, expected in skips:
        rows = table_without_weights(config(quantised, num_hidden_layers=2)).rows
        assert {row.name for row in rows if row.method and row.name.endswith(("up_proj.weight", "down_proj.weight"))} == expected


CUT = ("mxfp8", "float-quantized-block", "fp8-static", "modelopt-fp8", "nvfp4", "pack-quantized-asymmetric", "awq", "gptq")


@pytest.mark.parametrize(("family", "fmt"), [*product(["llama"], CUT), ("gpt_oss", "mxfp4"), ("qwen3_moe", "pack-quantized")])
def test_pieces_of_any_size_give_the_same_values_and_hash_every_byte(
    family: str, fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_packed(tmp_path / "model", family, fmt)
    decoder, needed_bytes, bytes_read = load_span(folder, LayerSpan(0, 3))
    assert bytes_read == needed_bytes
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    cut = load_span(folder, LayerSpan(0, 3))[0].skeleton.model.state_dict()
    assert all(same_bits(cut[name], whole) for name, whole in decoder.skeleton.model.state_dict().items() if not whole.is_meta)
    loaded = load_stage(StageSpec(str(folder), LayerSpan(0, 3), "bfloat16", "auto", "cpu", None), lambda *_: None)
    hashed = hash_weights(open_checkpoint(str(folder)), 3)
    assert hashed == {layer: loaded.digests[layer] for layer in hashed}
