"""What a chain captures at all nine sites equals, bit by bit, hooks on transformers' own modules that are spelled out here, family by family."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.errors import CheckpointError, ConfigError
from m2ray.model import site_table
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.site_proof import doubts, prove_sites
from m2ray.model.site_table import Point, Tap
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.tensor_table import up_to_layer
from tests.reference import LENGTHS, load_reference, make_family, make_minimax, micro_batch_of, minimax_config, same_bits, vocab_size
from tests.site_reference import FAMILIES, Values, by_hooks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            made[model_type] = make_minimax(folder, "bf16") if model_type == "minimax_m2" else make_family(folder, model_type)
        return made[model_type]

    return folder_of


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_sites_are_transformers_own_in_chains_of_1_3_and_n_stages(folders: Callable[[str], Path], model_type: str) -> None:
    folder = folders(model_type)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    for dtype in ("float32", "bfloat16"):
        expected = by_hooks(load_reference(folder, getattr(torch, dtype)), FAMILIES[model_type], micro_batch)
        if model_type == "opt":  # of this configuration a projection comes behind the norm
            del expected["final_norm", None]
        num_layers = 1 + max(layer for _, layer in expected if layer is not None)
        for bounds in ((0, num_layers), (0, 1, 3, num_layers), range(num_layers + 1)):
            found = by_chain(folder, bounds, dtype, micro_batch)
            assert found.keys() == expected.keys()
            differing = [key for key in expected if not all(map(same_bits, found[key], expected[key]))]
            assert differing == [], (dtype, bounds)


@pytest.mark.parametrize("model_type", ["bamba", "gemma3_text", "gpt_neox", "granite", "minimax_m2", "olmo2", "phi"])
def test_a_layers_output_is_its_input_and_its_branches_added_in_its_own_order(folders: Callable[[str], Path], model_type: str) -> None:
    folder = folders(model_type)
    for dtype in ("float32", "bfloat16"):
        found = by_chain(folder, (0, 2, 5 if model_type != "minimax_m2" else 7), dtype, micro_batch_of(LENGTHS, vocab_size(folder)))
        (stream,) = found["embedding", None]
        for (_, layer), (residual,) in [each for each in found.items() if each[0][0] == "residual"]:
            (attention,), (mlp,) = found["attention", layer], found["mlp", layer]
            if ("residual_mid", layer) in found:
                assert same_bits(stream + attention, found["residual_mid", layer][0])
                assert same_bits(stream + attention + mlp, residual)
            else:  # parallel branches are added to each other first
                assert same_bits(mlp + attention + stream, residual)
            stream = residual


def test_the_top_k_of_minimax_is_computed_again_from_stored_logits_and_bias(folders: Callable[[str], Path]) -> None:
    folder = folders("minimax_m2")
    found = by_chain(folder, (0, 3, 7), "bfloat16", micro_batch_of(LENGTHS, vocab_size(folder)))
    model = load_reference(folder, torch.bfloat16)
    for layer in range(7):
        (logits,), (ids, weights) = found["router_logits", layer], found["router_topk", layer]
        scores = logits.sigmoid()
        again = torch.topk(scores + model.model.layers[layer].mlp.e_score_correction_bias, 2, dim=-1, sorted=False).indices
        chosen = scores.gather(1, again)
        assert same_bits(again.to(torch.int16), ids)
        assert same_bits(chosen / chosen.sum(dim=-1, keepdim=True), weights)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_router_sites_are_there_with_any_implementation_of_experts(folders: Callable[[str], Path], experts: str) -> None:
    folder = folders("minimax_m2")
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    model = load_reference(folder, torch.float32)
    model.set_experts_implementation(experts)
    expected = by_hooks(model, FAMILIES["minimax_m2"], micro_batch)
    stages = [load(folder, LayerSpan(0, 7), "float32")]
    stages[0]._decoder.skeleton.model.set_experts_implementation(experts)
    found = taken(stages, micro_batch)
    assert all(all(map(same_bits, found[key], expected[key])) for key in expected)


def test_a_mix_of_sites_and_layers_gives_these_parts_and_no_others(folders: Callable[[str], Path]) -> None:
    stage = load_stage(StageSpec(str(folders("qwen3_moe")), LayerSpan(0, 5), "float32", "auto", "cpu", 1), lambda *_: None)
    stage.begin(CaptureSpec({"router_topk": (0, 2), "embedding": (), "mlp": (4,)}, "bfloat16"))
    captured = stage.forward(micro_batch_of(LENGTHS, 96), None).captured
    assert [(each.site, each.layer) for each in captured] == [("router_topk", 0), ("router_topk", 2), ("embedding", None), ("mlp", 4)]
    assert [each.columns[0].shape[1] for each in captured] == [2 * 2, 2 * 2, 48 * 2, 48 * 2]
    stage.begin(CaptureSpec({"residual": (1,)}, "bfloat16"))
    assert [(each.site, each.layer) for each in stage.forward(micro_batch_of(LENGTHS, 96), None).captured] == [("residual", 1)]


def test_what_a_layer_or_a_model_lacks_is_refused_by_name(folders: Callable[[str], Path]) -> None:
    stage = load_stage(StageSpec(str(folders("qwen3_moe")), LayerSpan(0, 5), "float32", "auto", "cpu", 1), lambda *_: None)
    with pytest.raises(ConfigError, match=r"'router_topk': layers \[1\] have no such site"):
        stage.begin(CaptureSpec({"router_topk": (0, 1)}, "float32"))
    with pytest.raises(ConfigError, match="has not loaded the final norm"):
        stage.begin(CaptureSpec({"final_norm": ()}, "float32"))
    parallel = load_stage(StageSpec(str(folders("phi")), LayerSpan(0, 5), "float32", "auto", "cpu", 1), lambda *_: None)
    with pytest.raises(ConfigError, match="'residual_mid': a phi has no such site"):
        parallel.begin(CaptureSpec({"residual_mid": (0,)}, "float32"))


def test_the_table_of_tensors_says_which_layers_have_what(folders: Callable[[str], Path]) -> None:
    def table(model_type: str) -> Any:
        return up_to_layer(open_checkpoint(str(folders(model_type))), 4)[1]

    mixed = table("qwen3_moe")
    assert (mixed.num_experts, mixed.experts_per_token) == (8, 2)
    assert mixed.layers_of["router_topk"] == (0, 2, 3, 4)
    assert mixed.layers_of["mlp"] == mixed.layers_of["residual"] == (0, 1, 2, 3, 4)
    assert mixed.layers_of["final_norm"] == mixed.layers_of["embedding"] == ()
    parallel = table("phi")
    assert "residual_mid" not in parallel.layers_of
    assert "router_logits" not in parallel.layers_of
    assert (parallel.num_experts, parallel.experts_per_token) == (0, 0)


def test_the_final_norm_is_loaded_by_the_last_stage_alone(folders: Callable[[str], Path]) -> None:
    folder = folders("qwen3")
    first, last = (load(folder, LayerSpan(*ends), "float32") for ends in ((0, 3), (3, 5)))
    assert [("final_norm", None) in [(part.site, part.layer) for part in stage.parts] for stage in (first, last)] == [False, True]
    without = load_stage(StageSpec(str(folder), LayerSpan(3, 5), "float32", "auto", "cpu", 1), lambda *_: None)
    assert last.needed_bytes - without.needed_bytes == 48 * 4
    assert last.digests[4] != without.digests[4], "other weights of the norm are other weights"
    assert last.digests[3] == without.digests[3]
    assert last.bare_last_layer == without.digests[4], "what a run has loaded that does not take the norm"
    assert without.bare_last_layer is None


def test_a_site_that_is_not_the_layers_own_is_found_by_its_additions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = minimax_config()
    prove_sites(config, ("attention", "router_topk"))
    monkeypatch.setitem(
        site_table._OTHERWISE,
        "minimax_m2",
        {"mlp": Point((Tap("self_attn"),)), "router_topk": Point((Tap("mlp.gate", place=2), Tap("mlp.gate", place=0)))},
    )
    assert doubts(config).keys() == {"mlp", "router_topk"}
    with pytest.raises(CheckpointError, match=r"sites = 'mlp': of a tiny minimax_m2.*does not compute with it"):
        prove_sites(config, ("mlp",))


def load(folder: Path, span: LayerSpan, dtype: str) -> Stage:
    """A stage that captures all that its span's layers have."""
    stage = load_stage(StageSpec(str(folder), span, dtype, "auto", "cpu", 1, with_final_norm=True), lambda *_: None)
    stage.begin(CaptureSpec(stage._decoder.site_layers, dtype))
    return stage


def by_chain(folder: Path, bounds: Sequence[int], dtype: str, micro_batch: MicroBatch) -> Values:
    """All that a chain captures: [N, W] a column."""
    return taken([load(folder, LayerSpan(*ends), dtype) for ends in pairwise(bounds)], micro_batch)


def taken(stages: Sequence[Stage], micro_batch: MicroBatch) -> Values:
    found: Values = {}
    boundary = None
    for stage in stages:
        output = stage.forward(micro_batch, boundary)
        boundary = output.boundary
        for part, captured in zip(stage.parts, output.captured, strict=True):
            dtypes = [getattr(torch, column.dtype) for column in part.columns]
            columns = [torch.from_numpy(column.copy()).view(dtype) for column, dtype in zip(captured.columns, dtypes, strict=True)]
            found[captured.site, captured.layer] = tuple(columns)
    return found
