"""Compiled layers of several families at their real dimensions, with m2ray's kernels and without, in turns on one GPU; MiniMax-M2's in float8 too.

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
from torch import nn

from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.bench.trial import random_values
from m2ray.model.boundary import Boundary
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import parse_config
from m2ray.model.filling import assign
from m2ray.model.float8.modules import SCALES, use_float8
from m2ray.model.float8.rounding import BLOCK, FP8
from m2ray.model.skeleton import build_skeleton

SHAPES = ((8, 2048), (32, 512))
OTHER = (24, 672)
"""Seen before anything is measured, so that the graph is one for all shapes."""

REPEATS, PASSES = 4, 10
COMPARED = (("with", "without", "the same layers without m2ray's kernels", "1.0"), ("float8", "with", "bfloat16, with them", "1.45"))
"""Each way, the one beside it, what that is called, and the ratio that is aimed at."""

IN_FLOAT8 = ("MiniMax-M2",)
"""Families whose checkpoints are FP8 in blocks of 128 x 128."""

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
    ways = {"without": compiled(config, LAYERS[name], kernels=False), "with": compiled(config, LAYERS[name])}
    if name in IN_FLOAT8:
        ways["float8"] = compiled(config, LAYERS[name], float8=True)
    rows = []
    for shape in SHAPES:
        times_ms: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(REPEATS):
            for way, decoder in ways.items():
                times_ms[way].append(pass_ms(step_of(decoder, shape)) / LAYERS[name])
        layer_ms = {way: statistics.median(each) for way, each in times_ms.items()}
        rates = {way: operations(ways["with"], *shape) / LAYERS[name] / each / 1e9 for way, each in layer_ms.items()}
        for way, beside, baseline, aim in COMPARED:
            if way not in ways:
                continue
            what = f"{name}{' in float8' if way == 'float8' else ''}, {shape[0]} x {shape[1]}"
            note = f"{layer_ms[way]:.2f} ms of {layer_ms[beside]:.2f} a layer; {LAYERS[name]} layers"
            print(what, note, f"{rates[way]:.0f} of {rates[beside]:.0f} TFLOP/s", flush=True)
            rows.append(Row(what, rates[way], "TFLOP/s", rates[beside], baseline, rates[way] / rates[beside], aim, note))
    return rows


def compiled(config: Any, num_layers: int, *, kernels: bool = True, float8: bool = False) -> DecoderSpan:
    """Layers behind the first, with random weights, after every shape was seen."""
    gpu = torch.device("cuda:0")
    skeleton = build_skeleton(config, torch.bfloat16)
    decoder = DecoderSpan(skeleton, LayerSpan(1, 1 + num_layers), gpu)
    for tensor in skeleton.needed(decoder.span):
        assign(skeleton.model, tensor.name, random_values(tensor.shape, tensor.dtype, gpu))
    if float8:
        for number in range(decoder.span.start, decoder.span.stop):
            pack(skeleton.layers[number])
    decoder.device = gpu if kernels else torch.device("cpu")  # told that it is on a CPU, it is compiled without
    decoder.compile_layers()
    decoder.device = gpu
    with torch.inference_mode():
        for shape in (*SHAPES, OTHER, *SHAPES):
            step_of(decoder, shape)()
    return decoder


def pack(layer: nn.Module) -> None:
    """Give a layer's projections and experts random FP8 weights with scales, and let them multiply in FP8."""
    for module in list(layer.modules()):
        names = ["weight"] if type(module) is nn.Linear else ["gate_up_proj", "down_proj"] if hasattr(module, "gate_up_proj") else []
        for name in names:
            weight = getattr(module, name)
            *stacked, height, width = weight.shape
            scales = torch.rand((*stacked, -(-height // BLOCK), width // BLOCK), device=weight.device) * 0.01 + 0.005
            setattr(module, name, nn.Parameter((weight * (3 / weight.std())).to(FP8), requires_grad=False))
            module.register_buffer(name + SCALES, scales)
    use_float8(layer)


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
