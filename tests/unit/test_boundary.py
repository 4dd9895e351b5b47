"""What families hand on beside one hidden state: over any cut the rows are those of transformers' own model, and the plan knows the bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from m2ray.batches import LayerSpan
from m2ray.chain.transport import receive, send
from m2ray.errors import CheckpointError, ConfigError
from m2ray.model.boundary import CANNOT_BE_CUT, CONTRACTS, crossing, row_width, token_bytes
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config, require_dtype
from m2ray.model.proof import prove
from m2ray.model.skeleton import build_skeleton
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.tensor_table import table_of, table_without_weights
from m2ray.planning.memory import span_rows, weight_bytes
from tests.reference import (
    LENGTHS,
    alone,
    assert_close,
    edited,
    load_capturing,
    load_chain,
    load_reference,
    make_family,
    micro_batch_of,
    reference_rows,
    same_bits,
)

VOCABULARY = 96
CUTS = ((0, 5), (0, 2, 5), (0, 3, 5), (0, 1, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5))
"""Between them every boundary, behind spans of one layer and of several."""


# Without towers of multimodal models, which are no models by themselves (test_multimodal.py proves them), and those that hand on what mamba does.
@pytest.fixture(
    scope="module",
    params=[*sorted(CONTRACTS.keys() - {"glm5_next_text", "hy_v4_vl_text", "falcon_mamba", "mamba2"}), "bamba", "falcon_h1"],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("deepseek"), "deepseek_v4")


def rows_through_transport(stages: list[Stage], micro_batch: Any) -> list[torch.Tensor]:
    """As `chain_rows`, each boundary having gone through the bytes that Ray would carry."""
    incoming, rows = None, []
    for stage in stages:
        output = stage.forward(micro_batch, incoming)
        rows += [
            torch.from_numpy(each.columns[0].copy()).view(getattr(torch, part.columns[0].dtype))
            for part, each in zip(stage.parts, output.captured, strict=True)
        ]
        if output.boundary is not None:
            incoming = receive(send(output.on_host()), pinned=False)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_cut_equals_the_whole_model(folder: Path, dtype: str) -> None:
    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    expected = reference_rows(load_reference(folder, getattr(torch, dtype)), micro_batch)
    handed_on = str(expected[0].dtype).removeprefix("torch.")  # float32 in mamba, whatever it computes with
    for bounds in CUTS:
        rows = rows_through_transport(load_chain(folder, bounds, dtype, handed_on), micro_batch)
        assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * 5, bounds


def test_a_prompt_alone_differs_by_rounding_only(folder: Path) -> None:
    model = load_reference(folder, torch.float32)
    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    rows = rows_through_transport(load_chain(folder, (0, 2, 3, 5), "float32"), micro_batch)
    stop = 0
    for index, length in enumerate(LENGTHS):
        start, stop = stop, stop + length
        assert_close([ours[start:stop] for ours in rows], reference_rows(model, alone(micro_batch, index)))


def test_what_crosses_is_what_was_planned(folder: Path) -> None:
    """To the byte, for prompts so long that the indexer leaves some out."""
    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    incoming, table = None, table_of_folder(folder)
    for layer, stage in enumerate(load_chain(folder, range(6), "bfloat16")[:-1], 1):
        incoming = stage.forward(micro_batch, incoming).boundary
        assert incoming is not None
        num_bytes = sum(tensor.nbytes for tensor in incoming.tensors.values())
        assert num_bytes == micro_batch.padded_tokens * stage.handed_bytes, layer
        assert stage.handed_bytes <= table.handed_bytes(2)


def table_of_folder(folder: Path) -> Any:
    checkpoint = open_checkpoint(str(folder))
    return table_of(build_skeleton(checkpoint.config, torch.bfloat16), checkpoint.headers)


def family_config(model_type: str, **fields: object) -> Any:
    read = json.loads((Path("tests/data/families") / f"{model_type}.json").read_text())
    return parse_config(json.dumps({**read, **fields}).encode())


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("glm_moe_dsa", [[], ["topk_indices"], ["topk_indices"], []]),
        ("deepseek_v4", [[], [], [], []]),
        (
            "gemma4_text",
            [
                ["per_layer_inputs"],
                ["full_attention.keys", "full_attention.values", "per_layer_inputs"],
                [
                    "full_attention.keys",
                    "full_attention.values",
                    "sliding_attention.keys",
                    "sliding_attention.values",
                    "per_layer_inputs",
                ],
                ["full_attention.keys", "full_attention.values", "per_layer_inputs"],
            ],
        ),
    ],
)
def test_only_what_later_layers_need_crosses(model_type: str, expected: list[list[str]]) -> None:
    assert [list(crossing(family_config(model_type), layer)) for layer in range(1, 5)] == expected


@pytest.mark.parametrize(
    ("model_type", "layer", "num_bytes"),
    [
        ("glm_moe_dsa", 4, 2 * 6144 + 4 * 2048),  # GLM-5 with an indexer in every fourth layer
        ("deepseek_v4", 7, 2 * 4 * 4096),
        ("gemma4_text", 15, 2 * (1536 + 2 * 256 + 2 * 512 + 20 * 256)),  # Gemma 4 E2B: one key-value head of 256, or of 512
        ("llama", 7, 2 * 4096),
    ],
)
def test_bytes_of_a_token_at_real_dimensions(model_type: str, layer: int, num_bytes: int) -> None:
    config = real_config(model_type)
    assert token_bytes(config, layer, torch.bfloat16) == num_bytes
    assert row_width(config) == config.hidden_size * (4 if model_type == "deepseek_v4" else 1)


REAL: dict[str, dict[str, object]] = {
    "deepseek_v4": {"rope_parameters": {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}},
    "gemma4_text": {"num_hidden_layers": 35, "hidden_size": 1536, "num_kv_shared_layers": 20, "num_key_value_heads": 1},
    "glm_moe_dsa": {"index_topk_freq": 4, "index_skip_topk_offset": 4},
    "hy_v4": {},
    "llama": {},
}
"""By model type, what published configurations have beside transformers' defaults."""


def real_config(model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type].from_dict({"model_type": model_type, **REAL[model_type]})
    return parse_config(json.dumps(config.to_dict(), default=str).encode())


@pytest.mark.parametrize("model_type", [model_type for model_type in REAL if model_type != "llama"])
def test_real_configurations_are_proved(model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prove(real_config(model_type))
    assert len(list((tmp_path / "m2ray" / "proofs").iterdir())) == 1, "it was proved, and is remembered"


def test_a_row_of_several_streams_is_all_of_them(deepseek: Path) -> None:
    """One after the other: the first H elements are stream 0."""
    micro_batch = micro_batch_of((7,), VOCABULARY)
    stage = load_chain(deepseek, (0, 2, 5), "float32")[0]
    output = stage.forward(micro_batch, None)
    assert output.boundary is not None
    assert output.boundary.hidden_BTH.shape == (1, 7, 4, 48)
    rows_NW = torch.from_numpy(output.captured[-1].columns[0].copy()).view(torch.float32)
    assert stage.parts[-1].columns[0].width == 4 * 48
    assert torch.equal(rows_NW.view(7, 4, 48), output.boundary.hidden_BTH[0])
    assert not torch.equal(rows_NW[:, :48], rows_NW[:, 48:96])


def test_tables_of_whole_numbers_are_counted_and_loaded_exactly(deepseek: Path) -> None:
    table = table_of_folder(deepseek)
    tables = [row for row in table.rows if row.name.endswith("tid2eid")]
    assert [(row.layer, row.shape, row.itemsize_bytes, row.disk_bytes) for row in tables] == [
        (layer, (VOCABULARY, 2), 8, 8 * 2 * VOCABULARY) for layer in (0, 1, 3)
    ]
    for span in (LayerSpan(0, 2), LayerSpan(2, 5)):
        stage = load_capturing(StageSpec(str(deepseek), span, "bfloat16", "auto", "cpu", 1))
        assert stage.parameter_bytes == weight_bytes(span_rows(table, span, with_final_norm=False), 2)
    published = table_without_weights(open_checkpoint(str(deepseek)).config)
    assert [row for row in published.rows if row.name.endswith("tid2eid")] == tables


def test_layers_with_tables_may_live_elsewhere(deepseek: Path, tmp_path: Path) -> None:
    """Two prompts one after the other: each layer is brought twice."""
    spec = StageSpec(str(deepseek), LayerSpan(0, 5), "bfloat16", "auto", "cpu", 1)
    stages = [
        load_capturing(each)
        for each in (spec, replace(spec, residency={0: "host", 1: "checkpoint", 3: "checkpoint"}, offload_folder=str(tmp_path)))
    ]
    for seed in (0, 1):
        micro_batch = micro_batch_of(LENGTHS, VOCABULARY, seed)
        expected, found = (rows_through_transport([stage], micro_batch) for stage in stages)
        assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def test_a_table_may_be_int32_and_no_float(deepseek: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.int() for key, tensor in tensors.items() if key.endswith("tid2eid")})

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.float() for key, tensor in tensors.items() if key.endswith("tid2eid")})

    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    expected, found = (
        rows_through_transport(load_chain(each, (0, 2, 5), "float32"), micro_batch)
        for each in (deepseek, edited(deepseek, tmp_path / "int32", narrow))
    )
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(CheckpointError, match=r"tid2eid is of dtype torch.float32, the model needs torch.int64"):
        load_chain(edited(deepseek, tmp_path / "float", spoil), (0, 5), "float32")


def test_transformers_own_deepseek_v4_fails_in_float16_so_it_is_refused(deepseek: Path) -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        reference_rows(load_reference(deepseek, torch.float16), micro_batch_of(LENGTHS, VOCABULARY))
    with pytest.raises(ConfigError, match="compute_dtype = 'float16': transformers keeps parts of a deepseek_v4"):
        require_dtype(open_checkpoint(str(deepseek)).config, "float16")
    require_dtype(open_checkpoint(str(deepseek)).config, "bfloat16")


def test_keys_and_values_that_shared_layers_do_not_use_may_be_there(tmp_path: Path) -> None:
    original = make_family(tmp_path / "gemma4", "gemma4_text")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("k_proj", "v_proj", "k_norm", "v_norm"):
            tensors[f"model.layers.3.self_attn.{name}.weight"] = torch.zeros(32, 48)

    micro_batch = micro_batch_of(LENGTHS, VOCABULARY)
    expected, found = (
        rows_through_transport(load_chain(each, (0, 2, 5), "float32"), micro_batch)
        for each in (original, edited(original, tmp_path / "more", add))
    )
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("model_type", sorted(CANNOT_BE_CUT))
def test_a_family_whose_state_cannot_be_cut_is_refused_by_name(model_type: str) -> None:
    drafting = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    whole = {"mistral_large4_text": "mistral_large4"}.get(
        model_type, model_type
    )  # of which transformers has no model without its other towers
    config = CONFIG_MAPPING[whole].from_dict(drafting if model_type.endswith("assistant") else {}).to_dict()
    with pytest.raises(CheckpointError, match=f"model_type = {model_type}: "):
        parse_config(json.dumps(config, default=str).encode())
