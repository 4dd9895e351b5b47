"""A span of the skeleton: what runs, what does not, and what is checked before anything is read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError
from m2ray.model import families, skeleton
from m2ray.model.boundary import Boundary
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import parse_config
from m2ray.model.interpreter import without_collector
from m2ray.model.skeleton import build_skeleton
from m2ray.model.weights import load_weights
from tests.reference import DATA, FAMILIES, load_reference, make_family, minimax_config

CPU = torch.device("cpu")


def family_config(model_type: str, **fields: object) -> object:
    return parse_config(json.dumps({**json.loads((DATA / "families" / f"{model_type}.json").read_text()), **fields}).encode())


def loaded(folder: Path, span: LayerSpan) -> DecoderSpan:
    checkpoint = open_checkpoint(str(folder))
    decoder = DecoderSpan(build_skeleton(checkpoint.config, torch.float32), span, CPU)
    load_weights(checkpoint, decoder, lambda *_: None)
    return decoder


def test_minimax_turns_rotary_dim_dimensions() -> None:
    decoder = DecoderSpan(build_skeleton(minimax_config(), torch.bfloat16), LayerSpan(3, 4), CPU)
    inv_freq = decoder.skeleton.model.model.rotary_emb.inv_freq
    assert inv_freq.numel() == 64 // 2
    assert torch.equal(inv_freq, 1 / 5e6 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))


def test_a_rotary_embedding_of_another_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_spell_out_partial_rotary", lambda config: config.rope_parameters.update(partial_rotary_factor=1.0))
    with pytest.raises(CheckpointError, match=r"inv_freq turns 128 dimensions of each head, config.json says 64"):
        DecoderSpan(build_skeleton(minimax_config(), torch.bfloat16), LayerSpan(0, 1), CPU)


@pytest.mark.parametrize(("family", "dims"), [("glm4_moe", 8), ("phi", 6), ("gpt_neox", 4)])
def test_partial_rotary_families_are_checked_too(family: str, dims: int) -> None:
    assert families.expected_rotary_dim(family_config(family)) == dims


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_have_the_values_that_transformers_gives_them(tmp_path: Path, family: str) -> None:
    fields = json.loads((DATA / "families" / f"{family}.json").read_text())
    expected = dict(
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[family].from_dict(fields), dtype=torch.float32).named_non_persistent_buffers()
    )
    decoder = DecoderSpan(build_skeleton(parse_config(json.dumps(fields).encode()), torch.float32), LayerSpan(0, 5), CPU)
    found = dict(decoder.skeleton.model.named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_buffer_that_transformers_leaves_empty_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_skeleton(family_config("llama"), torch.float32)
    monkeypatch.setattr(type(built.model.base_model), "_init_weights", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"no values to the buffers .*inv_freq"):
        DecoderSpan(built, LayerSpan(0, 5), CPU)


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        ("llama", ("model.embed_tokens",)),
        ("gpt2", ("transformer.wte", "transformer.wpe")),
        ("opt", ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in")),
    ],
)
def test_what_runs_before_the_layers_is_found_by_running(family: str, inputs: tuple[str, ...]) -> None:
    built = build_skeleton(family_config(family), torch.float32)
    assert built.inputs == inputs
    roles = {tensor.role for tensor in built.tensors.values()}
    assert {"embedding", "layer", "final_norm"} <= roles


def test_a_skeleton_takes_no_memory_and_keeps_every_layer() -> None:
    built = build_skeleton(minimax_config(), torch.bfloat16)
    assert all(tensor.is_meta for tensor in built.model.state_dict().values())
    assert [layer.self_attn.layer_idx for layer in built.layers] == list(range(62))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2", "llama"])
def test_the_work_for_a_layer_does_not_grow_with_their_number(family: str) -> None:
    """Calls are counted, of Python and of C: time would tell of the machine. The first build fills what transformers and torch keep."""

    def build(num_layers: int) -> None:
        config = family_config(family, num_hidden_layers=num_layers)
        DecoderSpan(build_skeleton(config, torch.float32), LayerSpan(1, 3), CPU)

    build(8)
    calls = [num_calls(lambda number=number: build(number)) for number in (8, 16, 32)]
    first, later = (calls[1] - calls[0]) / 8, (calls[2] - calls[1]) / 16
    assert later == pytest.approx(first, rel=0.002), f"{calls} calls for 8, 16 and 32 layers"


def num_calls(work: Callable[[], object]) -> int:
    count = 0

    def note(_frame: object, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    with without_collector():  # it would call what other tests have left
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(before)
    return count


def test_a_forward_pass_keeps_nothing_that_config_json_asks_for() -> None:
    asked = dict.fromkeys(("output_hidden_states", "output_attentions", "output_router_logits", "use_cache"), True)
    config = minimax_config(num_hidden_layers=2, **asked)
    built = build_skeleton(config, torch.bfloat16)
    assert not any(getattr(built.config, field) for field in asked)
    assert all(getattr(config, field) for field in asked), "the caller's configuration stays as it is"


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_minimax_keeps_its_routers_in_float32(compute_dtype: torch.dtype) -> None:
    kept = {
        name.partition("mlp.")[2]
        for name, tensor in build_skeleton(minimax_config(num_hidden_layers=2), compute_dtype).tensors.items()
        if tensor.dtype == torch.float32
    }
    if compute_dtype != torch.float32:
        assert kept == {"gate.weight", "e_score_correction_bias"}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_that_transformers_loads(tmp_path: Path, family: str, compute_dtype: torch.dtype) -> None:
    make_family(tmp_path, family)
    loaded_by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=compute_dtype).state_dict()
    built = build_skeleton(family_config(family), compute_dtype).tensors
    assert {name: tensor.dtype for name, tensor in built.items()} == {name: loaded_by_transformers[name].dtype for name in built}


def test_only_the_spans_layers_run(tmp_path: Path) -> None:
    decoder = loaded(make_family(tmp_path / "llama", "llama"), LayerSpan(2, 4))
    seen: list[int] = []
    hidden_BTH = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out_BTH = decoder.run(torch.zeros(2, 3, dtype=torch.long), Boundary(hidden_BTH), lambda _, layer, __: seen.append(layer)).hidden_BTH
    assert seen == [2, 3]
    assert out_BTH.shape == hidden_BTH.shape
    for number in (0, 1, 4):
        assert not list(decoder.skeleton.layers[number].parameters())


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "granite", "opt"])
def test_a_later_span_takes_hidden_states_as_they_are(tmp_path: Path, family: str) -> None:
    """These families scale what they take for embeddings, or add positions to it."""
    folder = make_family(tmp_path / family, family)
    decoder = loaded(folder, LayerSpan(1, 2))
    entered: list[torch.Tensor] = []
    decoder.skeleton.layers[1].register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    hidden_BTH = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder.run(torch.zeros(2, 3, dtype=torch.long), Boundary(hidden_BTH), lambda *_: None)
    assert torch.equal(entered[0], hidden_BTH)
    assert not any(isinstance(module, nn.Embedding) for module in decoder.skeleton.model.base_model.modules())


def test_layer_numbers_keep_their_meaning(tmp_path: Path) -> None:
    """GPT-2 may divide attention scores by the layer's number: layer 3 alone must not take itself for layer 0."""
    folder = make_family(tmp_path / "gpt2", "gpt2")
    hidden_BTH = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    decoder = loaded(folder, LayerSpan(3, 4))
    with torch.inference_mode():
        ours = decoder.run(torch.zeros(2, 6, dtype=torch.long), Boundary(hidden_BTH), lambda *_: None).hidden_BTH
        layer = load_reference(folder, torch.float32).transformer.h[3]
        causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, 6, 6)
        assert torch.allclose(ours, layer(hidden_BTH, attention_mask=causal), atol=1e-6)
        layer.attn.layer_idx = 0
        layer.attn.scaling *= 4
        assert not torch.allclose(ours, layer(hidden_BTH, attention_mask=causal), atol=1e-3)


def test_layers_that_return_tuples_are_found_by_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom's loop takes the first of what a layer returns, Llama's takes all of it."""
    built = {
        name: build_skeleton(CONFIG_MAPPING[name].from_dict({"hidden_size": 32, "num_hidden_layers": 2}), torch.float32)
        for name in ("bloom", "llama")
    }
    returned = {name: each.layers[0].forward(torch.zeros(1, 1, 32)) for name, each in built.items()}
    assert isinstance(returned["bloom"], tuple)
    assert isinstance(returned["llama"], torch.Tensor)


def test_a_layer_that_returns_no_hidden_states_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = loaded(make_family(tmp_path / "llama", "llama"), LayerSpan(0, 2))
    monkeypatch.setattr(decoder.skeleton.layers[0], "forward", lambda *_, **__: {})
    with pytest.raises(CheckpointError, match="A decoder layer returns a dict without hidden states"), torch.inference_mode():
        decoder.run(torch.zeros(1, 2, dtype=torch.long), None, lambda *_: None)


def test_missing_values_are_noticed_after_loading() -> None:
    decoder = DecoderSpan(build_skeleton(family_config("llama"), torch.float32), LayerSpan(0, 1), CPU)
    with pytest.raises(CheckpointError, match=r"tensors have no values: .*model.embed_tokens.weight"):
        decoder.check_complete()


def test_a_config_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"transformers (cannot build|refuses)"):
        build_skeleton(family_config("gpt2", n_head=5), torch.float32)


def test_layers_are_one_list_or_refused() -> None:
    model = build_skeleton(family_config("llama"), torch.float32).model
    assert skeleton.find_layers(model)[0] == "model.layers"
    model.config.num_hidden_layers = 4
    with pytest.raises(CheckpointError, match="0 lists of 4 decoder layers"):
        skeleton.find_layers(model)
    model.config.num_hidden_layers = 5
    model.model.more = nn.ModuleList(model.model.layers)
    with pytest.raises(CheckpointError, match="2 lists of 5 decoder layers"):
        skeleton.find_layers(model)
