"""The proof on a tiny copy: what differs from transformers or is not causal is refused though nobody listed it, and what is right passes.

Which model types pass: tests/unit/test_models_*.py.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.chain.checking import look
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, M2rayError
from m2ray.model import decoder, families, proof, rehearsal
from m2ray.model.families import parse_config
from m2ray.model.proof import prove
from m2ray.model.site_proof import prove_sites
from m2ray.model.tensor_table import table_without_weights
from m2ray.model.tiny import WINDOW, kept_layers, tiny_copies
from m2ray.planning.shape import ModelShape
from tests.reference import DATA, FAMILIES, make_family

TYPES = ("gemma3_text", "gpt2", "minimax_m2", "qwen3")
LLAMA_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "m2ray" / "proofs"


def fields_of(model_type: str) -> dict[str, Any]:
    path = DATA / "families" / f"{model_type}.json"
    path = path if path.exists() else DATA / model_type / "config.json"
    return dict(json.loads(path.read_text()))


def unchecked(model_type: str, **fields: Any) -> Any:
    """A configuration as transformers reads it, past what m2ray refuses by name."""
    return CONFIG_MAPPING[model_type].from_dict({**fields_of(model_type), **fields})


@pytest.mark.parametrize("model_type", TYPES)
def test_a_configuration_is_proved_in_a_moment_and_again_from_the_cache(
    model_type: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(json.dumps(fields_of(model_type)).encode())
    began = time.process_time()
    prove(config)
    assert time.process_time() - began < 5
    assert len(list(cache.iterdir())) == 1  # proved, not let in unseen
    monkeypatch.setattr(proof, "rehearse", lambda *_: pytest.fail("was proved before"))
    prove(config)


@pytest.mark.parametrize("callers", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)], ids=["device", "autocast"])
def test_what_the_caller_has_torch_compute_by_is_not_what_a_copy_is_proved_by(callers: Any, cache: Path) -> None:
    with callers:
        prove(parse_config(json.dumps(fields_of("gpt2")).encode()))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("model_type", TYPES)
def test_a_field_that_makes_a_family_look_ahead_is_found_though_nobody_listed_it(model_type: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)a tiny {model_type} .* the tokens after them.*right-padded"):
        prove(unchecked(model_type, is_causal=False))
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])  # gemma2's eager attention gets a causal mask all the same
def test_use_bidirectional_attention_is_found_where_transformers_honours_it(model_type: str) -> None:
    with pytest.raises(CheckpointError, match="the tokens after them"):
        prove(unchecked(model_type, use_bidirectional_attention=True))


def test_rows_that_change_with_their_company_are_found() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)config\.json: rows of a tiny llama .* right-padded beside a longer one"):
        prove(unchecked("llama", rope_parameters=LLAMA_ROPE, max_position_embeddings=12))


@pytest.mark.parametrize(
    ("method", "error"), [("exists", PermissionError()), ("mkdir", PermissionError()), ("expanduser", RuntimeError("there is no home"))]
)
def test_without_a_cache_every_run_proves_again_and_none_fails(
    monkeypatch: pytest.MonkeyPatch, cache: Path, method: str, error: Exception
) -> None:
    usual = getattr(Path, method)

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if "proofs" in path.parts or path.parts == ("~", ".cache"):
            raise error
        return usual(path, *args, **options)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache.parent))
    monkeypatch.setattr(Path, method, refused)
    prove(unchecked("qwen3"))
    with pytest.raises(CheckpointError, match="the tokens after them"):
        prove(unchecked("qwen3", is_causal=False))


@pytest.mark.parametrize("model_type", [*FAMILIES, "minimax_m2"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"is_causal": False}, "is_causal = False"),
        ({"is_causal": None}, "is_causal = None"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"text_config": {"use_bidirectional_attention": ["vision"]}}, r"text_config\.use_bidirectional_attention = \['vision'\]"),
        ({"text_config": {"is_causal": False}}, r"text_config\.is_causal = False"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, r"text_config\.use_bidirectional_attention = all"),
    ],
)
def test_known_fields_are_refused_by_name_and_value(model_type: str, fields: dict[str, Any], named: str) -> None:
    unknown = r"(?s:transformers refuses config\.json .*'use_bidirectional_attention' with value True)"  # Gemma 4 knows "all" and "vision"
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}: the model is not causal|{unknown}"):
        parse_config(json.dumps({**fields_of(model_type), **fields}).encode())


@pytest.mark.parametrize("fields", [{"is_causal": True}, {"use_bidirectional_attention": False}, {"use_bidirectional_attention": None}])
def test_the_same_fields_that_say_causal_are_read(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prove(parse_config(json.dumps({**fields_of("qwen3"), **fields}).encode()))
    assert len(list((tmp_path / "m2ray" / "proofs").iterdir())) == 1, "it was proved, and is remembered"


def test_an_extraction_is_proved_before_ray_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family(tmp_path / "model", "qwen3")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_causal": False}))
    (tmp_path / "prompts.txt").write_text("a\n")
    config = ExtractConfig(model=str(model), prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "run"))
    with pytest.raises(M2rayError, match="is_causal = False"):
        look(config)
    monkeypatch.setattr(families, "_not_causal", lambda _: [])
    with pytest.raises(M2rayError, match="the tokens after them"):
        look(config)


def test_a_max_length_beyond_learned_positions_is_refused_from_the_configuration(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "gpt2")
    (tmp_path / "prompts.txt").write_text("a\n")
    config = ExtractConfig(model=str(model), prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "run"), max_length=129)
    with pytest.raises(M2rayError, match=r"max_length = 129, but a gpt2 of config\.json has 128 positions\. Set max_length to 128"):
        look(config)


def test_a_tiny_copy_keeps_ratios_and_every_kind_of_layer() -> None:
    minimax = next(tiny_copies(parse_config(json.dumps(fields_of("minimax_m2")).encode())))
    assert minimax.num_hidden_layers <= 3
    assert minimax.num_attention_heads // minimax.num_key_value_heads == 6
    assert (minimax.head_dim, minimax.rotary_dim, minimax.rope_parameters["partial_rotary_factor"]) == (128, 64, 0.5)
    assert minimax.num_local_experts == 16
    assert minimax.num_experts_per_tok == 8
    deep = next(
        tiny_copies(unchecked("deepseek_v3", first_k_dense_replace=3, num_hidden_layers=61, n_routed_experts=256, n_group=8, topk_group=4))
    )
    assert (deep.num_hidden_layers, deep.n_routed_experts, deep.first_k_dense_replace) == (5, 32, 3)
    gemma = unchecked("gemma3_text", num_hidden_layers=34, sliding_window=1024)
    assert next(tiny_copies(gemma)).sliding_window == WINDOW
    kinds = [gemma.layer_types[layer] for layer in kept_layers(gemma)]
    assert kinds[:4] == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert next(tiny_copies(gemma)).layer_types == kinds


LARGE = {
    "qwen3_moe": {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128},
    "deepseek_v3": {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "n_group": 8},
    "gemma3_text": {"hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
    "falcon": {
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
    },
}
"""The sizes of released models, far too large to be built as they are."""


@pytest.mark.parametrize("model_type", LARGE)
def test_released_sizes_are_proved_in_a_moment(model_type: str, cache: Path) -> None:
    fields = {"model_type": model_type, "vocab_size": 150_000, "sliding_window": 1024, **LARGE[model_type]}
    config = parse_config(json.dumps(fields).encode())
    began = time.process_time()
    prove(config)
    assert time.process_time() - began < 5
    assert len(list(cache.iterdir())) == 1


def test_experts_that_are_counted_layer_by_layer_are_proved_and_planned(cache: Path) -> None:
    """As Hunyuan-A13B's release counts them."""
    counted = {"moe_topk": [8] * 32, "num_shared_expert": [1] * 32, "moe_intermediate_size": [3072] * 32}
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = parse_config(json.dumps({"model_type": "hunyuan_v1_moe", "num_experts": 64, **sizes, **counted}).encode())
    prove(config)
    prove_sites(config, {"router_topk": (0, 31)})
    shape, table = ModelShape.of(config, "sdpa"), table_without_weights(config)
    assert (shape.num_experts, shape.experts_per_token, shape.expert_size) == (64, 8, 3072)
    assert (table.num_experts, table.experts_per_token) == (64, 8)
    assert len(list(cache.iterdir())) == 2


def test_a_width_that_transformers_experts_cannot_have_is_found_and_explained() -> None:
    """The copy's experts are narrower, and as little a multiple of 8."""
    with pytest.raises(
        CheckpointError, match=r"transformers' own model fails in bfloat16: RuntimeError: .* have to be multiples of 8 in bfloat16"
    ):
        prove(unchecked("qwen3_moe", moe_intermediate_size=100))


def test_of_few_layers_no_list_is_cut_that_is_as_long_by_chance() -> None:
    config = parse_config((DATA / "families" / "falcon_h1.json").read_bytes())
    assert len(config.ssm_multipliers) == config.num_hidden_layers
    assert [tiny.ssm_multipliers for tiny in tiny_copies(config)] == [config.ssm_multipliers] * 4


def test_what_cannot_be_made_tiny_is_refused_as_not_proved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_MOST_PARAMETERS", 1000)
    with pytest.raises(
        CheckpointError, match=r"no tiny copy of this llama can be made, so nothing is proved: .* still has [\d,]+ parameters"
    ):
        prove(unchecked("llama"))
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(("in_a_first_stage", "where"), [(False, "3 stages"), (True, "1 stage in waves")])
def test_what_a_chain_gets_wrong_is_refused_with_layer_dtype_stages_and_size(
    cache: Path, monkeypatch: pytest.MonkeyPatch, where: str, *, in_a_first_stage: bool
) -> None:
    inject = decoder.DecoderSpan._inject

    def injured(self: Any, *given: Any) -> Any:
        entered = inject(self, *given)
        if entered is None or not self._layers.start or in_a_first_stage != (self.span.start == 0):
            return entered
        args, kwargs = entered
        return tuple(arg * 1.01 if isinstance(arg, torch.Tensor) else arg for arg in args), kwargs

    monkeypatch.setattr(decoder.DecoderSpan, "_inject", injured)
    with pytest.raises(CheckpointError) as refused:
        prove(unchecked("qwen3"))
    for dtype in ("float32", "bfloat16"):
        what = (
            f"of a tiny qwen3 with its fields, a chain of {where} in {dtype} differs from transformers' own model from layer 1 on, by 0.0"
        )
        assert what in str(refused.value)
    assert not list(cache.glob("*"))


def test_a_chain_that_fails_is_refused_with_what_it_fails_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_check_rotary", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match=r"a chain of 1 stage in float32 fails: ZeroDivisionError: division by zero"):
        prove(unchecked("llama"))
