"""The text tower of a multimodal checkpoint runs as a text model: transformers' own whole model, given text alone, is what it equals."""

import json
import re
import shutil
from math import prod
from pathlib import Path

import pytest
import torch

from m2ray.cli.plan_inputs import read_model
from m2ray.errors import CheckpointError
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.proof import prove
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.tensor_table import table_without_weights, tensor_table
from m2ray.model.towers import decoder_config, placeholder_tokens
from scripts.make_checkpoint import plan_tensors, resolve_config
from tests.reference import (
    DATA,
    LENGTHS,
    chain_rows,
    edited,
    load_chain,
    load_reference,
    make_m3,
    make_wrapper,
    micro_batch_of,
    reference_rows,
    same_bits,
)

WRAPPERS = ("gemma3", "kimi_k25", "llama4", "mistral3", "qwen3_5", "qwen3_vl_moe")
VOCABULARY = 400
"""Below the tokens that stand for images."""


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wrapper(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_m3(tmp_path_factory.mktemp("m3") / "model")


def fields_of(name: str) -> dict:
    return json.loads((DATA / "wrappers" / f"{name}.json").read_text())


def assert_equals_the_whole_model(folder: Path, bounds_of: dict[int, tuple[int, ...]]) -> None:
    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    for dtype in ("float32", "bfloat16"):
        expected = reference_rows(load_reference(folder, getattr(torch, dtype)), micro_batch)
        rows = chain_rows(load_chain(folder, bounds_of[len(expected)], dtype), micro_batch)
        assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * len(expected), dtype


def test_a_chain_equals_the_whole_model_given_text(wrapper: Path) -> None:
    assert_equals_the_whole_model(wrapper, {4: (0, 1, 3, 4), 5: (0, 2, 3, 5), 7: (0, 1, 4, 7)})


def test_minimax_m3_equals_the_whole_model_given_text(m3: Path) -> None:
    assert_equals_the_whole_model(m3, {6: (0, 2, 4, 6)})


def test_minimax_m3_is_laid_out_as_its_release() -> None:
    """The release lists 23,416 tensors of 427,040,140,160 values."""
    tensors = plan_tensors(resolve_config(json.loads((DATA / "minimax_m3" / "config.json").read_text()), {}, "bf16"))
    assert len(tensors) == 23_416
    assert sum(prod(tensor.shape) for tensor in tensors) == 427_040_140_160
    in_float32 = {re.sub(r"\.\d+\.", ".N.", tensor.name) for tensor in tensors if tensor.dtype == "F32"}
    assert in_float32 == {
        "language_model.model.layers.N.block_sparse_moe.e_score_correction_bias",
        "language_model.model.layers.N.block_sparse_moe.gate.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
    }


def test_the_layers_that_a_plan_counts_are_those_of_the_text_tower(m3: Path) -> None:
    checkpoint = open_checkpoint(str(m3))
    table, by_config = tensor_table(checkpoint), table_without_weights(checkpoint.whole_config)
    assert (table.num_layers, table.hidden_size) == (6, 128)
    unread = {key for row in table.rows if row.role == "unused" for key in row.sources}
    assert unread == {key for key in checkpoint.headers if not key.startswith("language_model.")}
    read = [row for row in table.rows if row.role != "unused"]
    assert {(row.name, row.role, row.shape, row.sources) for row in read} == {
        (row.name, row.role, row.shape, row.sources) for row in by_config.rows
    }


def test_layouts_of_several_releases_give_the_same_rows(tmp_path: Path) -> None:
    """Gemma 3 is published with `language_model.model.` and, since transformers 5, `model.language_model.`."""
    older = make_wrapper(tmp_path / "older", "gemma3")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("language_model.model.")]:
            tensors[key.replace("language_model.model.", "model.language_model.")] = tensors.pop(key)
        assert any(key.startswith("model.language_model.") for key in tensors)

    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    newer = edited(older, tmp_path / "newer", rename)
    expected, rows = (chain_rows(load_chain(folder, (0, 2, 7), "float32"), micro_batch) for folder in (older, newer))
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


def test_a_plan_by_the_index_alone_takes_the_published_names(tmp_path: Path) -> None:
    """transformers 5.24 writes Kimi's text layers as `blocks`, where Moonshot's release has `layers`."""
    folder, alone = make_wrapper(tmp_path / "kimi", "kimi_k25"), tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    released = {key.replace("language_model.model.blocks", "language_model.model.layers"): file for key, file in index.items()}
    assert released.keys() != index.keys()
    (alone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": released}))
    assert read_model(str(alone), "auto", "bfloat16").table.num_layers == 5
    del released["language_model.model.layers.3.mlp.experts.2.up_proj.weight"]
    (alone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": released}))
    with pytest.raises(CheckpointError, match="lacks 16 tensors"):
        read_model(str(alone), "auto", "bfloat16")


def test_what_is_beside_the_text_tower_need_not_be_right(m3: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_tower.vision_model.pre_layrnorm.weight"] = torch.zeros(3)
        tensors["vision_tower.vision_model.of_another_release.weight"] = torch.zeros(3)
        del tensors["patch_merge_mlp.linear_1.bias"]

    tensor_table(open_checkpoint(str(edited(m3, tmp_path / "spoilt", spoil))))


def test_an_unknown_tensor_of_the_text_tower_is_refused(m3: Path, tmp_path: Path) -> None:
    key = "language_model.model.layers.1.self_attn.unknown.weight"
    folder = edited(m3, tmp_path / "unknown", lambda tensors: tensors.update({key: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"{re.escape(key)}: .* has no such tensor"):
        tensor_table(open_checkpoint(str(folder)))


def test_a_text_tower_that_hands_on_more_than_hidden_states_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prove(
        parse_config(json.dumps({"model_type": "hy_v4_vl"}).encode())
    )  # glm5_next is on the page of models: its proof takes 6 s of a core
    assert len(list((tmp_path / "m2ray" / "proofs").iterdir())) == 1, "it was proved, and is remembered"


def test_kimi_k2_is_deepseek_v3() -> None:
    fields = fields_of("kimi_k25")["text_config"]
    kimi, deepseek = (parse_config(json.dumps({**fields, "model_type": name}).encode()) for name in ("kimi_k2", "deepseek_v3"))
    assert kimi == deepseek
    assert type(decoder_config(parse_config(json.dumps(fields_of("kimi_k25")).encode()))) is type(deepseek)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3", {500: "image_token_index"}),
        ("kimi_k25", {500: "image_token_id", 501: "video_token_id"}),
        ("qwen3_vl_moe", {500: "image_token_id", 501: "video_token_id"}),
    ],
)
def test_tokens_that_stand_for_images_are_told(name: str, expected: dict[int, str]) -> None:
    found = placeholder_tokens(parse_config(json.dumps(fields_of(name)).encode()))
    assert found.keys() == expected.keys()
    assert all("token" in field for field in found.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_causal": False}, "text_config.is_causal = False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e6}}, "text_config.rope_scaling"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups = None does not say how"),
        ({"quantization_config": "int4"}, "quantization_config = 'int4' is no JSON object"),
    ],
)
def test_what_is_wrong_with_the_text_tower_is_refused(changes: dict, said: str) -> None:
    fields = fields_of("mistral3")
    fields["text_config"] |= changes
    with pytest.raises(CheckpointError, match=re.escape(said)):
        parse_config(json.dumps(fields).encode())


def test_a_quantization_of_the_text_tower_alone_counts() -> None:
    fields = fields_of("mistral3")
    fields["text_config"]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert [method.name for method in layout_of(parse_config(json.dumps(fields).encode())).methods] == ["FP8 in blocks of 128 x 128"]
