"""Attention beyond the family's own: what is refused and why, and that flex and flash see each prompt alone, at its own positions.

flash-attn runs on GPUs only; here its two functions are written in torch as its documentation defines them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils

from m2ray.batches import LayerSpan
from m2ray.errors import ConfigError
from m2ray.model import attention
from m2ray.model.attention import require_attention_to_sinks, require_machine, resolve_attn_implementation
from m2ray.model.families import parse_config
from m2ray.model.stage import Stage, StageSpec, load_stage
from tests.reference import (
    DATA,
    FAMILIES,
    LENGTHS,
    assert_close,
    chain_rows,
    load_chain,
    load_reference,
    make_family,
    make_minimax,
    micro_batch_of,
    minimax_config,
    reference_rows,
    same_bits,
    vocab_size,
)

WITHOUT_FLEX = ("bamba", "deepseek_v4", "falcon_h1", "glm_moe_dsa", "gpt2", "gpt_oss", "hy_v4", "mamba", "olmoe")
FLEX = [family for family in FAMILIES if family not in WITHOUT_FLEX]
FLASH = ["minimax_m2", "llama", "gemma2", "gemma3_text", "deepseek_v3"]
CPU = torch.device("cpu")


def family_config(model_type: str, **fields: object) -> Any:
    if model_type == "minimax_m2":
        return minimax_config(**fields)
    return parse_config(json.dumps({**json.loads((DATA / "families" / f"{model_type}.json").read_text()), **fields}).encode())


def make(folder: Path, family: str) -> Path:
    return make_minimax(folder, "bf16") if family == "minimax_m2" else make_family(folder, family)


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_auto_is_what_the_family_can_do() -> None:
    for family, chosen in (("llama", "sdpa"), ("minimax_m2", "sdpa"), ("gpt_oss", "eager"), ("gemma2", "eager")):
        assert resolve_attn_implementation(family_config(family), "auto", torch.bfloat16) == chosen
    assert resolve_attn_implementation(family_config("llama"), "flex_attention", torch.float32) == "flex_attention"
    assert resolve_attn_implementation(family_config("llama"), "flash_attention_2", torch.bfloat16) == "flash_attention_2"


@pytest.mark.parametrize(
    ("family", "wanted", "dtype", "reason"),
    [
        ("gpt_oss", "sdpa", torch.bfloat16, "'sdpa' and model_type gpt_oss: transformers' GptOssForCausalLM does not support it"),
        ("gpt2", "flex_attention", torch.bfloat16, "GPT2LMHeadModel does not support it"),
        ("olmoe", "flex_attention", torch.bfloat16, "OlmoeForCausalLM does not support it"),
        ("llama", "flash_attention_2", torch.float32, "compute_dtype is float32"),
        ("gpt_oss", "flash_attention_2", torch.bfloat16, "sinks"),
        ("llama", "flash_attention_9", torch.bfloat16, "there is no such attention"),
    ],
)
def test_a_family_or_dtype_that_cannot_is_refused(family: str, wanted: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve_attn_implementation(family_config(family), wanted, dtype)


def test_capped_scores_are_never_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers let Gemma 2 run with sdpa, which drops its cap."""
    monkeypatch.setattr("transformers.Gemma2ForCausalLM._supports_sdpa", True)
    assert resolve_attn_implementation(family_config("gemma2"), "auto", torch.bfloat16) == "eager"
    with pytest.raises(ConfigError, match="attn_logit_softcapping = 50"):
        resolve_attn_implementation(family_config("gemma2"), "sdpa", torch.bfloat16)


def test_all_reasons_are_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_attn_implementation(family_config("llama", head_dim=320), "flash_attention_2", torch.float32)
    assert "float32" in str(refused.value)
    assert "these have 320" in str(refused.value)
    monkeypatch.setattr(attention, "_FLASH_PACKAGE", "no-such-package")
    with pytest.raises(ConfigError) as refused:
        require_machine(family_config("llama"), "flash_attention_2", CPU)
    assert "needs a CUDA GPU, and the stage is on cpu" in str(refused.value)
    assert "the package no-such-package is not installed" in str(refused.value)


def test_sinks_of_a_family_that_nobody_listed_are_told_by_their_names() -> None:
    names = ("model.layers.0.self_attn.sink_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ConfigError, match="has sinks, and it would leave them out"):
        require_attention_to_sinks(family_config("llama"), "flash_attention_2", names)
    require_attention_to_sinks(family_config("llama"), "flash_attention_2", names[1:])
    require_attention_to_sinks(family_config("llama"), "sdpa", names)


def test_a_machine_that_cannot_is_refused_by_the_stage(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "gpt_oss", "gpt_oss")
    spec = StageSpec(str(folder), LayerSpan(0, 2), "bfloat16", "flex_attention", "cpu", 1)
    with pytest.raises(ConfigError, match="on GPUs only"):
        load_stage(spec, lambda *_: None)
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        load_stage(
            replace(spec, model_url=str(make_family(tmp_path / "llama", "llama")), attn_implementation="flash_attention_2"), lambda *_: None
        )


# -- flex -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """flex_attention as torch defines it, step by step: what its kernels are held against, and no compiling of every family."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", [*FLEX, "minimax_m2"])
def test_flex_equals_the_whole_model_with_the_same(tmp_path: Path, family: str) -> None:
    folder = make(tmp_path / family, family)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    reference = load_reference(folder, torch.float32, "flex_attention")
    num_layers = reference.config.num_hidden_layers
    rows = chain_rows(load_chain(folder, (0, 2, 3, num_layers), "float32", attn="flex_attention"), micro_batch)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, reference_rows(reference, micro_batch), strict=True))
    assert_close(rows, chain_rows(load_chain(folder, (0, num_layers), "float32", attn="eager"), micro_batch))


# -- flash ----------------------------------------------------------------------------------------------------------------


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002 - the package's signature
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,  # noqa: FBT001, FBT002 - the package's signature
) -> torch.Tensor:
    """flash_attn.flash_attn_func: [B, T, A, D], both ends of the window inclusive, -1 for none."""
    assert dropout_p == 0
    assert causal
    query, key, value = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None]
    seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
    if not softcap:
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=softmax_scale)
    else:
        scores = (query @ key.transpose(-1, -2)) * (softmax_scale or query.shape[-1] ** -0.5)
        out = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).to(q.dtype)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,  # noqa: FBT001, FBT002
) -> torch.Tensor:
    """flash_attn.flash_attn_varlen_func: sequences one after the other, [N, A, D]."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    spans = pairwise(cu_seqlens_q.tolist())
    return torch.cat([flash_attn_func(*(tensor[None, a:b] for tensor in (q, k, v)), *options)[0] for a, b in spans])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    functions = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: functions)


def with_flash(stages: list[Stage]) -> list[Stage]:
    for stage in stages:
        stage._decoder.skeleton.config._attn_implementation = "flash_attention_2"
    return stages


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("lengths", [LENGTHS, (37,), (20, 20), (1,)], ids=str)
@pytest.mark.parametrize("family", FLASH)
def test_flash_sees_each_prompt_alone(tmp_path: Path, family: str, lengths: tuple[int, ...]) -> None:
    folder = make(tmp_path / family, family)
    micro_batch = micro_batch_of(lengths, vocab_size(folder), pad_to=max(lengths) + 3)
    bounds = (0, 2, 7 if family == "minimax_m2" else 5)
    eager = chain_rows(load_chain(folder, bounds, "float32", attn="eager"), micro_batch)
    assert_close(chain_rows(with_flash(load_chain(folder, bounds, "float32", attn="eager")), micro_batch), eager)
