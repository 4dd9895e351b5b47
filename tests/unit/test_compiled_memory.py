"""What torch.compile's code for a plain layer allocates, beside what is planned. Its kernels are left out: memory is all that is looked at."""

from typing import Any

import pytest
import torch
from torch.profiler import profile
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from m2ray.config import ExtractConfig
from m2ray.model.tensor_table import table_without_weights
from m2ray.options import PromptOptions
from m2ray.planning.demand import Demand
from m2ray.planning.memory import gpu_overhead
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape, all_plain
from tests.unit.test_memory import LayersDone, leave

SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 64}
SEQUENCES, TOKENS = 4, 512


def allocated_bytes(config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that a compiled layer holds at once beside its weights, input included."""
    monkeypatch.setattr("torch._inductor.async_compile.AsyncCompile.cpp_pybinding", lambda *_, **__: lambda *_: None)
    torch._dynamo.reset()
    model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    model.layers[0].forward = torch.compile(model.layers[0].forward, options={"fx_graph_cache": False, "cpp.simdlen": 1})
    model.layers[0].register_forward_hook(leave)
    hidden_BTH = torch.zeros(SEQUENCES, TOKENS, config.hidden_size, dtype=dtype)
    for how in ("compiled", "counted"):
        with torch.inference_mode(), profile(profile_memory=how == "counted") as profiled, pytest.raises(LayersDone):
            model(inputs_embeds=hidden_BTH, position_ids=torch.arange(TOKENS)[None], use_cache=False)
    now_bytes = peak_bytes = hidden_BTH.nbytes
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now_bytes += event.nbytes()
            peak_bytes = max(peak_bytes, now_bytes)
    return peak_bytes


@pytest.mark.parametrize("family", ["llama", "granite", "cohere2"])
@pytest.mark.parametrize("intermediate_size", [4096, 256])
def test_the_bound_holds_for_a_plain_layer_that_is_compiled(family, intermediate_size, monkeypatch):
    """Where the MLP is the peak, as in wide models, and where attention is."""
    config = CONFIG_MAPPING[family](**SIZES, intermediate_size=intermediate_size)
    allocated = allocated_bytes(config, torch.bfloat16, monkeypatch)
    shape = ModelShape(512, 8, 2, 128, intermediate_size, is_plain=True)
    planned = shape.compiled_transient_bytes(SEQUENCES * TOKENS, TOKENS, 2)
    assert allocated <= planned <= (1.1 if intermediate_size == 4096 else 2.7) * allocated


@pytest.mark.parametrize(
    ("family", "are_plain"),
    [
        ("llama", True),
        ("qwen3", True),
        ("gemma3_text", True),
        ("phi3", False),
        ("falcon_h1", False),
        ("glm4_moe", False),
        ("gemma4_text", False),
    ],
)
def test_layers_are_plain_where_they_are_attention_and_a_gated_mlp_alone(family, are_plain):
    table = table_without_weights(AutoConfig.from_pretrained(f"tests/data/families/{family}.json"))
    assert all_plain(table.rows, table.num_layers) is are_plain


def test_what_llama_70b_s_widths_took_on_an_h200():
    """benchmarks/results/against_fpwap.json, 30 November 2026: the first of six layers ready, the others brought, waves of two micro-batches."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 4096}
    config = CONFIG_MAPPING["llama"](**sizes, num_hidden_layers=6)
    table, shape = table_without_weights(config), ModelShape.of(config, "sdpa")
    asked = ExtractConfig(model="m", prompts="p", output="o", compile=True, batch_tokens=11_008)
    demand = Demand(table, shape, resolve(asked, PromptOptions.of(asked, 1), table, shape)).assuming(longest_tokens=1024)
    overhead = gpu_overhead(demand.workload, demand.captured_row_bytes(), is_alone=True)
    layer_bytes, embedding_bytes = table.layer_bytes(2)[0], table.role_bytes("embedding", 2)
    planned = embedding_bytes + 3 * layer_bytes + 2 * 11_008 * 16_384 + sum(overhead.values())
    assert 9_316_466_688 <= planned <= 1.105 * 9_316_466_688
