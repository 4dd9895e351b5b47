"""Heads that are normed and turned by one operation in compiled layers on a GPU: found in transformers' own attention, computed on a CPU by torch."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeAttention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Attention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from m2ray.model import rotary
from tests.compiled_graph import graphs_of
from tests.reference import load_chain, make_minimax

SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "attn_implementation": "sdpa"}
OF_GLM = {"use_qk_norm": True, "attention_bias": False}
OF_DEEPSEEK = {
    "num_key_value_heads": 6,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def traced(attention: torch.nn.Module, angles: tuple[torch.Tensor, torch.Tensor], hidden_BTH: torch.Tensor) -> tuple[GraphModule, Any]:
    """The attention's graph as torch.compile has it, and what it is called with."""
    given = dict(attention.named_parameters()), hidden_BTH, *angles

    def forward(weights: dict[str, torch.Tensor], hidden_BTH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return functional_call(attention, weights, (hidden_BTH, (cos, sin), None))[0]  # type: ignore[no-any-return]

    module = make_fx(forward, decomposition_table=select_decomp_table())(*given)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, given


def made(of: Any, **fields: object) -> torch.nn.Module:
    model_type = of.__module__.rpartition(".modeling_")[2]
    model_type = {"gemma3": "gemma3_text"}.get(model_type, model_type)
    attention = of(AutoConfig.for_model(model_type, **SIZES | fields), 0).bfloat16().requires_grad_(False).eval()
    for weight in attention.parameters():
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return attention  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("of", "fields", "part", "norms"),
    [
        (MiniMaxM2Attention, {}, 8, (96, 32)),
        (OlmoeAttention, {"num_key_value_heads": 6}, 16, (96, 96)),
        (Qwen3MoeAttention, {}, 16, (16, 16)),
        (Glm4MoeAttention, OF_GLM, 8, (16, 16)),
        (LlamaAttention, {}, 16, (None, None)),
    ],
)
@pytest.mark.parametrize("num_angles", [1, 2])
def test_heads_are_turned_as_by_transformers(
    of: Any, fields: dict[str, Any], part: int, norms: tuple[int | None, ...], num_angles: int
) -> None:
    """The attention is as near to the same in float64 as with its own steps, but for what else is rounded in it."""
    torch.manual_seed(0)
    attention = made(of, **fields)
    angles = torch.randn(num_angles, 33, part).bfloat16(), torch.randn(num_angles, 33, part).bfloat16()
    hidden_BTH = torch.randn(2, 33, 96).bfloat16()
    module, given = traced(attention, angles, hidden_BTH)
    rotary.replace_turned(module.graph)
    module.graph.lint()
    module.recompile()
    found = module.graph.find_nodes(op="call_function", target=torch.ops.m2ray.turned_heads.default)
    assert tuple(None if node.args[1] is None else len(node.args[1].meta["val"]) for node in found) == norms
    assert "aten.neg" not in module.code
    assert "aten.rsqrt" not in module.code
    exact = deepcopy(attention).double()(hidden_BTH.double(), tuple(each.double() for each in angles), None)[0]
    error, of_own = ((each - exact).norm() / exact.norm() for each in (module(*given), attention(hidden_BTH, angles, None)[0]))
    assert error < 1.2 * of_own


@pytest.mark.parametrize(
    ("of", "fields", "part"),
    [
        (CohereAttention, {}, 16),
        (Ernie4_5_MoeAttention, {}, 16),
        (Gemma3Attention, {}, 16),
        (DeepseekV3Attention, OF_DEEPSEEK, 16),
        (Glm4MoeAttention, OF_GLM | {"attention_bias": True}, 8),
        (LlamaAttention, {"head_dim": 24}, 24),
        (Glm4MoeAttention, OF_GLM, 4),
    ],
)
def test_other_heads_are_left_to_torch(of: Any, fields: dict[str, Any], part: int) -> None:
    """Whose neighbours turn together, whose norm adds 1 to its weight, of which a part comes from elsewhere, with a bias, or parts that are no powers of two."""
    angles = torch.randn(1, 33, part).bfloat16(), torch.randn(1, 33, part).bfloat16()
    module, _ = traced(made(of, **fields), angles, torch.randn(2, 33, 96).bfloat16())
    code = module.code
    rotary.replace_turned(module.graph)
    module.recompile()
    assert module.code == code


@pytest.mark.parametrize(("kind", "number"), [("first", 1), ("last", 0), ("scaled", 0), ("doubled", 0), ("float32", 0)])
def test_only_the_first_part_of_a_products_heads_is_turned(kind: str, number: int) -> None:
    """Not another part, nor by angles that the layer computes, nor what it computes between the product and the turn, nor in another dtype."""

    def forward(hidden_BTH: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        product = hidden_BTH @ weight
        heads = (product * 2 if kind == "doubled" else product).view(2, 33, -1, 16).transpose(1, 2)
        turning = heads[..., 8:] if kind == "last" else heads[..., :8]
        cos = cos * 2 if kind == "scaled" else cos
        turned = turning * cos.unsqueeze(1) + rotate_half(turning) * sin.unsqueeze(1)
        return torch.cat([turned, heads[..., 8:]], -1)

    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    given = [torch.randn(shape).to(dtype) for shape in ((2, 33, 96), (96, 96), (1, 33, 8), (1, 33, 8))]
    module = make_fx(forward, decomposition_table=select_decomp_table())(*given)
    rotary.replace_turned(module.graph)
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.m2ray.turned_heads.default)) == number


def test_they_are_found_in_what_torch_compile_makes_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = load_chain(make_minimax(tmp_path / "model", "fp8"), (0, 1), "bfloat16")
    for graph, is_static in zip(graphs_of(stage, [rotary.replace_turned], monkeypatch), (True, False), strict=True):
        found = graph.find_nodes(op="call_function", target=torch.ops.m2ray.turned_heads.default)
        assert len(found) == 2
        assert {isinstance(size, int) for node in found for size in node.args[0].meta["val"].shape[:2]} == {is_static}
