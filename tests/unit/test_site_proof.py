"""The sites of families that do something otherwise than most, and of those whose layers have no such tensor: proved, or refused with the reason."""

import pytest

from scripts.model_outcomes import doubts_of, sites_of

ODD = {
    "bloom": "into `post_attention_layernorm` | `self_attention.dense` | `mlp.dense_4h_to_h` | into `mlp` | - | - | -",
    "cohere2": "- | `self_attn` | `mlp` | into `mlp` | - | - | -",
    "falcon_h1": "into `pre_ff_layernorm` | `mamba` x `ssm_out_multiplier` + `self_attn` x `attn_out_multiplier` | `feed_forward` | into `feed_forward` | - | - | -",
    "granitemoehybrid": "into `post_attention_layernorm` | `mamba` x `residual_multiplier` | (`block_sparse_moe` + `shared_mlp`) x `residual_multiplier` | "
    "into `block_sparse_moe` | `block_sparse_moe.router` | `block_sparse_moe.router`[2], `block_sparse_moe.router`[1] | -",
    "llama4_text": "into `post_attention_layernorm` | `self_attn` | `feed_forward` | into `feed_forward` | `feed_forward.router`[1] | "
    "`feed_forward.router`[1], `feed_forward.router` | -",
    "nanochat": "into `post_attention_layernorm` | `self_attn` | `mlp` | into `mlp` | - | - | -",
    "nemotron_h": "- | `mixer` | `mixer` | into `mixer` | `mixer.gate` | `mixer.gate`[2], `mixer.gate`[1] | -",
    "opt": "into `final_layer_norm` | `self_attn` | `fc2` | into `fc1` | - | - | -",
}
REFUSED = {
    "beam": ("attention, mlp: it scales its stream before each addition",),
    "deepseek_v4": ("attention, mlp: its layers mix several residual streams", "mlp_in, final_norm: it is narrower"),
    "jetmoe": ("router_topk: its router returns tokens sorted by expert",),
    "trocr": ("residual_mid, attention, mlp: it normalises its stream",),
}


@pytest.mark.parametrize("model_type", ODD)
def test_what_odd_families_show_is_what_their_layers_compute_with(model_type: str) -> None:
    assert sites_of(model_type) == ODD[model_type]
    assert doubts_of(model_type) == {}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_determined_is_refused_with_the_reason(model_type: str) -> None:
    assert all(reason in sites_of(model_type) for reason in REFUSED[model_type])
