"""Compiled layers of several families at their real dimensions, with m2ray's kernels and without, in turns on one GPU.

    python -m benchmarks.layers_on_gpu [FAMILY ...]

Weights are random. Needs a GPU with 110 GB for MiniMax-M2.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.bench.trial import random_values
from m2ray.model.boundary import Boundary
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import parse_config
from m2ray.model.filling import assign
from m2ray.model.skeleton import build_skeleton

SHAPES = ((8, 2048), (32, 512))
OTHER = (24, 672)
"""Seen before anything is measured, so that the graph is one for all shapes."""

REPEATS, PASSES = 4, 10
LAYERS = {"MiniMax-M2": 3, "Qwen3-30B-A3B": 6, "DeepSeek-V3": 1, "Llama-8B": 6, "Llama-70B": 4}

_MOE = {"num_hidden_layers": 8, "num_experts_per_tok": 8, "hidden_act": "silu"}
_LLAMA = {"model_type": "llama", "num_hidden_layers": 8, "num_key_value_heads": 8, "vocab_size": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "MiniMax-M2": {
        "model_type": "minimax_m2",
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 256,
        "vocab_size": 4096,
        **_MOE,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "norm_topk_prob": True,
        "vocab_size": 4096,
        **_MOE,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "vocab_size": 4096, **_MOE},
    "Llama-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, **_LLAMA},
    "Llama-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, **_LLAMA},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("family", nargs="*", default=list(CONFIGS), help="all of them without")
    options = parser.parse_args()
    for name in options.family:
        record(f"layers_on_gpu_{name.lower()}", f"Compiled layers of {name} at its real dimensions, bfloat16", measured(name))


def measured(name: str) -> list[Row]:
    config = parse_config(json.dumps(CONFIGS[name]).encode())
    ways = {"without": compiled(config, LAYERS[name], kernels=False), "with": compiled(config, LAYERS[name], kernels=True)}
    rows = []
    for shape in SHAPES:
        times_ms: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(REPEATS):
            for way, decoder in ways.items():
                times_ms[way].append(pass_ms(step_of(decoder, shape)) / LAYERS[name])
        before_ms, after_ms = (statistics.median(times_ms[way]) for way in ("without", "with"))
        tera = operations(ways["with"], *shape) / LAYERS[name] / 1e12
        rates = tera / after_ms * 1e3, tera / before_ms * 1e3
        note = f"{after_ms:.2f} ms of {before_ms:.2f} a layer; {LAYERS[name]} layers"
        what = f"{name}, {shape[0]} x {shape[1]}"
        print(what, note, f"{rates[0]:.0f} of {rates[1]:.0f} TFLOP/s", flush=True)
        rows.append(Row(what, rates[0], "TFLOP/s", rates[1], "the same layers without m2ray's kernels", rates[0] / rates[1], "1.0", note))
    return rows


def compiled(config: Any, num_layers: int, *, kernels: bool) -> DecoderSpan:
    """Layers behind the first, with random weights, after every shape was seen."""
    gpu = torch.device("cuda:0")
    skeleton = build_skeleton(config, torch.bfloat16)
    decoder = DecoderSpan(skeleton, LayerSpan(1, 1 + num_layers), gpu)
    for tensor in skeleton.needed(decoder.span):
        assign(skeleton.model, tensor.name, random_values(tensor.shape, tensor.dtype, gpu))
    decoder.device = gpu if kernels else torch.device("cpu")  # told that it is on a CPU, it is compiled without
    decoder.compile_layers()
    decoder.device = gpu
    with torch.inference_mode():
        for shape in (*SHAPES, OTHER, *SHAPES):
            step_of(decoder, shape)()
    return decoder


def step_of(decoder: DecoderSpan, shape: tuple[int, int]) -> Callable[[], object]:
    token_ids_BT = torch.zeros(shape, dtype=torch.int64, device="cuda")
    hidden_BTH = torch.randn((*shape, decoder.skeleton.config.hidden_size), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    boundary = Boundary(hidden_BTH.bfloat16())
    return lambda: decoder.run(token_ids_BT, boundary, lambda *_: None)


@torch.inference_mode()
def pass_ms(step: Callable[[], object]) -> float:
    step()
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(PASSES):
        step()
    torch.cuda.synchronize()
    return (time.monotonic() - began) / PASSES * 1e3


def operations(decoder: DecoderSpan, sequences: int, length: int) -> float:
    """Floating-point operations: matrix products of what a token meets, and causal attention."""
    config, tokens, met = decoder.skeleton.config, sequences * length, 0.0
    for tensor in decoder.skeleton.needed(decoder.span):
        numbers = float(torch.Size(tensor.shape).numel())
        if len(tensor.shape) == 3:
            met += numbers * config.num_experts_per_tok / tensor.shape[0]
        elif len(tensor.shape) == 2:
            met += numbers
    key = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads * (key + (getattr(config, "v_head_dim", None) or key))
    return float(2 * tokens * met + tokens * length * heads * (decoder.span.stop - decoder.span.start))


if __name__ == "__main__":
    main()
