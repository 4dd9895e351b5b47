"""Packed weights that are half known are refused, by the tensor's name, before any is read; and so are configurations of other kinds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2ray.errors import CheckpointError
from m2ray.model import pieces
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensor_table import table_of
from m2ray.model.tensors import match_by_layer
from scripts.checkpoint_formats.table import FORMATS
from tests.packed import make_packed
from tests.reference import edited, load_chain

Q = "model.layers.1.self_attn.q_proj."
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def refusal(folder: Path) -> str:
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError) as caught:
        list(match_by_layer(build_skeleton(checkpoint.config, torch.bfloat16), checkpoint.headers))
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "fmt", "part"),
    [
        ("gpt_oss", "mxfp4", f"{EXPERTS}_scales"),
        ("llama", "mxfp4-pack-quantized", f"{Q}weight_scale"),
        ("llama", "nvfp4", f"{Q}weight_scale_2"),
        ("llama", "nvfp4", f"{Q}weight_scale"),
        ("llama", "nvfp4-pack-quantized", f"{Q}weight_global_scale"),
        ("llama", "pack-quantized", f"{Q}weight_shape"),
        ("llama", "pack-quantized-asymmetric", f"{Q}weight_zero_point"),
        ("llama", "awq", f"{Q}qzeros"),
        ("llama", "gptq", f"{Q}g_idx"),
    ],
)
def test_a_part_is_missing_or_of_another_shape(family: str, fmt: str, part: str, tmp_path: Path) -> None:
    whole = make_packed(tmp_path / "whole", family, fmt)
    assert f"{part} is missing" in refusal(edited(whole, tmp_path / "without", lambda tensors: tensors.pop(part)))

    def longer(tensors: dict[str, torch.Tensor]) -> None:
        tensors[part] = torch.cat([tensors[part].reshape(-1), tensors[part].reshape(-1)])

    shape = list(load_file(whole / "model.safetensors")[part].shape)
    assert f"{part} is " in (said := refusal(edited(whole, tmp_path / "longer", longer)))
    assert f"{shape if shape != [1] else []}." in said  # one number may have axes or none


@pytest.mark.parametrize(
    ("fmt", "part", "dtype"),
    [("nvfp4", "weight_scale", torch.uint8), ("pack-quantized", "weight_scale", torch.float8_e4m3fn), ("gptq", "qzeros", torch.float32)],
)
def test_a_part_is_of_another_dtype(fmt: str, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q + part] = torch.zeros(tensors[Q + part].shape).to(dtype)

    said = refusal(edited(make_packed(tmp_path / "whole", "llama", fmt), tmp_path / "changed", change))
    assert f"{Q}{part} is {str(dtype).removeprefix('torch.')} [" in said


def test_zero_points_that_config_does_not_name(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}weight_zero_point"] = torch.zeros(8, 2, dtype=torch.int32)

    assert f"{Q}weight_zero_point" in refusal(edited(make_packed(tmp_path / "whole", "llama", "pack-quantized"), tmp_path / "more", add))


def test_groups_in_an_order_of_their_own_that_compressed_tensors_no_longer_writes(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}weight_g_idx"] = torch.zeros(64, dtype=torch.int32)

    assert f"{Q}weight_g_idx" in refusal(edited(make_packed(tmp_path / "whole", "llama", "pack-quantized"), tmp_path / "more", add))


@pytest.mark.parametrize(
    ("fmt", "changed", "said"),
    [
        ("awq", {"bits": 3}, "AWQ with bits = 3"),
        ("awq", {"version": "gemv_fast"}, "AWQ with version = 'gemv_fast'"),
        ("awq", {"zero_point": False}, "AWQ with zero_point = False"),
        ("awq", {"group_size": 0}, "AWQ with group_size = 0"),
        ("gptq", {"bits": 8}, "GPTQ with bits = 8"),
        ("awq", {"format": "gemv"}, "AWQ with version = 'gemm' and format = 'gemv', which contradict each other"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format = 'marlin'"),
        ("gptq-v2", {"format": "gptq_p"}, "GPTQ with format = 'gptq_p'"),
        ("gptq", {"format": "gptq_v2"}, "GPTQ with checkpoint_format = 'gptq' and format = 'gptq_v2', which contradict each other"),
        ("gptq", {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "GPTQ with dynamic ="),
        ("nvfp4", {"quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ'"),
        ("nvfp4", {"group_size": 32}, "NVFP4 with group_size 32"),
        ("deepseek-v4", {"expert_dtype": "int4"}, "expert_dtype 'int4'"),
    ],
)
def test_another_kind_of_a_method(fmt: str, changed: dict, said: str, tmp_path: Path) -> None:
    assert said in config_refusal(tmp_path, FORMATS[fmt].quantization_config() | changed)


@pytest.mark.parametrize(
    ("fmt", "changed", "said"),
    [
        ("pack-quantized", {"num_bits": 3}, "pack-quantized with weights"),
        ("pack-quantized", {"strategy": "block", "block_structure": [16, 16]}, "pack-quantized with a scale a block of 16 x 16"),
        ("pack-quantized-asymmetric", {"strategy": "tensor"}, "pack-quantized with zero points and a scale a tensor"),
        ("nvfp4-pack-quantized", {"group_size": 32}, "nvfp4-pack-quantized with group_size = 32"),
        ("nvfp4-pack-quantized", {"symmetric": False}, "nvfp4-pack-quantized with symmetric = False"),
        ("mxfp4-pack-quantized", {"group_size": 16}, "mxfp4-pack-quantized with group_size = 16"),
    ],
)
def test_other_weights_of_compressed_tensors(fmt: str, changed: dict, said: str, tmp_path: Path) -> None:
    says = FORMATS[fmt].quantization_config()
    says["config_groups"]["group_0"]["weights"] = says["config_groups"]["group_0"]["weights"] | changed
    assert said in config_refusal(tmp_path, says)


def config_refusal(tmp_path: Path, says: dict) -> str:
    fields = json.loads((make_packed(tmp_path / "packed", "llama", "pack-quantized") / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        parse_config(json.dumps(fields | {"quantization_config": says}).encode())
    return str(caught.value)


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-pack-quantized"])
def test_scales_of_activations_are_counted_and_unread(fmt: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_packed(tmp_path / "packed", "llama", fmt)))
    table = table_of(build_skeleton(checkpoint.config, torch.bfloat16), checkpoint.headers)
    unused = {row.name for row in table.rows if row.role == "unused"}
    expected = {key for key in checkpoint.headers if key.endswith(("input_scale", "input_global_scale", "k_scale", "v_scale"))}
    assert unused == expected
    assert sum(row.disk_bytes for row in table.rows) == sum(header.num_bytes for header in checkpoint.headers.values())


@pytest.mark.parametrize("is_whole", [False, True])
def test_gptq_whose_groups_are_in_another_order_than_config_says(
    is_whole: bool,  # noqa: FBT001 - pytest's
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of single features, or of whole groups, which a piece of one group does not show."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if is_whole:
            tensors |= {key: tensor.sort(descending=True).values for key, tensor in tensors.items() if key.endswith("g_idx")}

    monkeypatch.setattr(pieces, "PIECE_BYTES", 512)
    folder = edited(make_packed(tmp_path / "made", "llama", "gptq"), tmp_path / "packed", change)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["desc_act"] = False
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"desc_act = false, but g_idx has the groups in an order of their own"):
        load_chain(folder, (0, 1), "bfloat16")


def test_gptq_that_names_a_group_which_there_is_not(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}g_idx"][3] = 99

    folder = edited(make_packed(tmp_path / "packed", "llama", "gptq"), tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match="g_idx names groups from 0 to 99"):
        load_chain(folder, (0, 3), "bfloat16")
