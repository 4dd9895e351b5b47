"""Tiny checkpoints whose FP8 weights can stay as they are, the same weights in bfloat16 without a rounding, and transformers' model of those with
products as `compute_dtype = "float8"` has them, in float64.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.make_checkpoint import RandomWeights, plan_tensors, write_shard
from tests.reference import DATA, load_reference

FILE = "model.safetensors"
SAYS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "float8_e4m3fn"}
LEFT_OUT = {"minimax_m2": ["gate", "e_score_correction_bias", "lm_head"], "qwen3_moe": ["mlp.gate", "lm_head"], "llama": ["lm_head"]}

_SIZES: Mapping[str, Mapping[str, Any]] = {
    "minimax_m2": {
        "head_dim": 64,
        "rotary_dim": 32,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attn_type_list": [1, 1, 1],
    },
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 256, "intermediate_size": 384},
    "llama": {"head_dim": 64, "intermediate_size": 256},
}
_COMMON = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}


def config_of(family: str) -> dict[str, Any]:
    """Its config.json, without what is said of quantisation."""
    path = DATA / "minimax_m2" / "config.json" if family == "minimax_m2" else DATA / "families" / f"{family}.json"
    fields = {**json.loads(path.read_text()), **_COMMON, **_SIZES[family]}
    fields.pop("quantization_config", None)
    return fields


def make_float8(folder: Path, family: str = "minimax_m2") -> Path:
    """A checkpoint in FP8 with scales that are powers of two: bfloat16 holds its weights as they are."""
    config = config_of(family) | {"quantization_config": SAYS | {"modules_to_not_convert": LEFT_OUT[family]}}
    folder.mkdir(parents=True)
    write_shard(folder / FILE, plan_tensors(config), RandomWeights(7, 2))
    tensors = load_file(folder / FILE)
    for name, scales in tensors.items():
        if name.endswith("_scale_inv"):
            scales.log2_().round_().exp2_()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    _write(folder, config, tensors)
    return folder


def make_plain(folder: Path, packed: Path, family: str = "minimax_m2") -> Path:
    """The same weights in bfloat16."""
    tensors, plain = load_file(packed / FILE), {}
    for name, values in tensors.items():
        if values.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain[name] = (values.float() * scales).bfloat16()
            assert torch.equal(plain[name].float(), values.float() * scales)
        elif not name.endswith("_scale_inv"):
            plain[name] = values
    folder.mkdir()
    save_file(plain, folder / FILE, metadata={"format": "pt"})
    _write(folder, config_of(family), plain)
    return folder


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))


def reference_of(plain: Path) -> Any:
    """transformers' model, whose experts are computed one after the other."""
    model = load_reference(plain, torch.bfloat16)
    model.config._experts_implementation = "eager"
    return model


@contextmanager
def rounding_inputs(model: Any) -> Iterator[None]:
    """While it lasts, the products of the layers' projections and experts have inputs rounded to FP8 in blocks of 128, and are made in float64."""
    names = ("_proj.weight", "gate_up_proj", "down_proj")
    rounded = {tensor.untyped_storage().data_ptr() for name, tensor in model.named_parameters() if name.endswith(names)}
    linear = torch.nn.functional.linear

    def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() not in rounded:
            return linear(hidden, weight, bias)
        return (in_fp8(hidden) @ weight.double().T).to(hidden.dtype)

    torch.nn.functional.linear = product
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def in_fp8(hidden: torch.Tensor) -> torch.Tensor:
    """What FP8 makes of activations, in float64: a scale for each 128 of them, by which their largest becomes 448."""
    blocks = hidden.float().reshape(-1, 128)
    scales = blocks.abs().max(1, keepdim=True).values / 448
    scales[scales == 0] = 1
    return ((blocks / scales).to(torch.float8_e4m3fn).double() * scales.double()).reshape(hidden.shape)
