"""Checkpoint tensors that transformers lays side by side or splits: where they go, and what is said of those that do not fit.

That the values are right is what the proof of these families shows (tests/unit/test_models_*.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.errors import CheckpointError
from m2ray.model.conversion import Placement
from m2ray.model.headers import TensorHeader, read_file_header
from m2ray.model.quantization.layout import plain
from m2ray.model.rehearsal import Rehearsal
from m2ray.model.skeleton import ModelTensor, build_skeleton
from m2ray.model.tensors import MatchedTensor, _check_dtype, disk_bytes, match_by_layer
from m2ray.model.tiny import tiny_copies
from m2ray.storage import open_store

CONV = "model.layers.0.self_attn.{}_conv1d.weight"
FUSED = "model.layers.0.attention.query_key_value.weight"


class Published:
    """A tiny checkpoint as transformers publishes its type, to be edited."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.config = next(tiny_copies(CONFIG_MAPPING[model_type]()))
        Rehearsal(self.config, 0, folder)
        self._folder = folder
        self.tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")

    def headers(self) -> Any:
        save_file(self.tensors, self._folder / "edited.safetensors")
        return read_file_header(open_store(str(self._folder)), "edited.safetensors").tensors

    def matched(self) -> dict[str, MatchedTensor]:
        skeleton = build_skeleton(self.config, torch.float32)
        return {each.tensor.name: each for layer in match_by_layer(skeleton, self.headers()) for each in layer}


@pytest.fixture
def kimi(tmp_path: Path) -> Published:
    return Published("kimi_linear", tmp_path)


@pytest.fixture
def sarvam(tmp_path: Path) -> Published:
    return Published("sarvam_moe", tmp_path)


def test_tensors_side_by_side_fill_one_without_a_gap(kimi: Published) -> None:
    placed = kimi.matched()["model.layers.0.self_attn.conv1d.weight"]
    assert [each.key for each in placed.placements] == [CONV.format(name) for name in "qkv"]
    ends = [(each.start, each.start + (each.length or 0)) for each in placed.placements]
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
    assert ends[-1][1] == placed.tensor.shape[0]


def test_one_of_the_tensors_side_by_side_is_missing(kimi: Published) -> None:
    del kimi.tensors[CONV.format("k")]
    with pytest.raises(CheckpointError, match=r"lacks 'self_attn\.k_conv1d\.weight' of model\.layers\.0\.self_attn\.conv1d\.weight"):
        kimi.matched()


def test_tensors_side_by_side_of_wrong_sizes(kimi: Published) -> None:
    kimi.tensors[CONV.format("k")] = kimi.tensors[CONV.format("k")][1:].contiguous()
    with pytest.raises(CheckpointError, match=r"k_conv1d.* have \d+ rows together along axis 0, the model of config\.json needs \d+"):
        kimi.matched()


def test_a_tensor_is_split_among_three_and_each_row_counted_once(sarvam: Published) -> None:
    matched = sarvam.matched()
    parts = [each for each in matched.values() if any(placement.key == FUSED for placement in each.placements)]
    assert len(parts) == 3
    rows = sorted(placement.rows for each in parts for placement in each.placements if placement.rows is not None)
    assert [first for first, _ in rows] == [0, *(stop for _, stop in rows[:-1])]
    assert rows[-1][1] == sarvam.tensors[FUSED].shape[0]
    headers = sarvam.headers()
    assert sum(map(disk_bytes, parts)) == headers[FUSED].num_bytes


def test_a_tensor_to_be_split_of_a_wrong_size(sarvam: Published) -> None:
    sarvam.tensors[FUSED] = sarvam.tensors[FUSED][1:].contiguous()
    with pytest.raises(
        CheckpointError, match=r"query_key_value\.weight has shape .* the model of config\.json needs \d+ rows for .*q_proj"
    ):
        sarvam.matched()


@pytest.mark.parametrize("block", [None, [3, 16], [16, 16]])
def test_fp8_is_split_among_three_where_its_blocks_are(sarvam: Published, block: list[int] | None) -> None:
    sarvam.config.quantization_config = {"quant_method": "fp8", "weight_block_size": block}
    sarvam.tensors[FUSED] = sarvam.tensors[FUSED].to(torch.float8_e4m3fn)
    rows, columns = sarvam.tensors[FUSED].shape
    scales = () if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    sarvam.tensors[f"{FUSED}_scale_inv"] = torch.ones(scales)
    if block == [3, 16]:
        with pytest.raises(CheckpointError, match=r"query_key_value\.weight is FP8 .*takes rows .*cuts it at multiples of 3 rows only"):
            sarvam.matched()
        return
    parts = [each for each in sarvam.matched().values() if any(placement.key == FUSED for placement in each.placements)]
    headers = sarvam.headers()
    assert sum(map(disk_bytes, parts)) == headers[FUSED].num_bytes + headers[f"{FUSED}_scale_inv"].num_bytes


def test_axes_that_are_swapped_on_disk() -> None:
    placement, values = Placement("x", swapped=(1, 2)), torch.arange(24.0).view(2, 3, 4)
    assert placement.shape_in((2, 3, 4)) == (2, 4, 3)
    into = torch.empty(2, 3, 4)
    placement.part_of(into).copy_(values.transpose(1, 2))
    assert torch.equal(into, values)


@pytest.mark.parametrize(("on_disk", "is_read"), [(torch.int64, True), (torch.int32, True), (torch.float32, False)])
def test_a_table_of_numbers_is_read_from_whole_numbers_alone(on_disk: torch.dtype, is_read: bool) -> None:  # noqa: FBT001
    header = TensorHeader("model.safetensors", on_disk, (4, 2), 0, 8 * on_disk.itemsize)
    problems = list(_check_dtype(ModelTensor("t", "layer", 0, (4, 2), torch.int64), plain("t", header)))
    assert (problems == []) == is_read
    assert is_read or "the model needs torch.int64" in str(problems[0])


def test_a_models_own_scale_is_found_though_engines_have_some_of_its_name(tmp_path: Path) -> None:
    """gemma3n's `correct_output_scale`, in a checkpoint that is quantised: such names are led to tensors only where one has found none."""
    gemma = Published("gemma3n_text", tmp_path)
    gemma.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    gemma.tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)
    gemma.tensors["model.layers.1.self_attn.k_scale"] = torch.ones(1)
    skeleton = build_skeleton(gemma.config, torch.float32)
    unread: dict[str, Any] = {}
    matched = [each.tensor.name for layer in match_by_layer(skeleton, gemma.headers(), None, unread) for each in layer]
    assert [name for name in matched if name.endswith(".altup.correct_output_scale")]
    assert {key for key, (reason, _) in unread.items() if reason == "unused"} >= {
        "model.layers.0.mlp.up_proj.input_scale",
        "model.layers.1.self_attn.k_scale",
    }
    assert not {key for key in unread if key.endswith("correct_output_scale")}
