"""Write a random-weight checkpoint in the on-disk layout of a published one: MiniMax-M2 in FP8, or any plain decoder in bf16.

    python scripts/make_checkpoint.py OUT --config tests/data/minimax_m2/config.json --layers 4 --hidden-size 256 --format fp8 --seed 0

Names and shapes come from transformers: its model on the meta device, taken back through its own checkpoint conversion. Every tensor's
values depend on the seed and the tensor's published name alone, so that `--format bf16` holds exactly the dequantised values of
`--format fp8`, `--layout fused` stacks exactly those, and the size of the shards changes nothing.
"""

import argparse
import hashlib
import json
import logging
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.config import parse_bytes
from m2ray.errors import ConfigError, raise_all

Format = Literal["fp8", "bf16"]
Layout = Literal["hub", "fused"]

# The option's name, and the config fields that may carry it: the first that the config or its class knows.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_experts": ("num_local_experts", "num_experts"),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "experts_per_token": ("num_experts_per_tok",),
    "vocab_size": ("vocab_size",),
    "rotary_dim": ("rotary_dim",),
}
DENSE_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "float8_e4m3fn",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
F32_MODULES = {"minimax_m2": ("mlp.gate.weight", "mlp.e_score_correction_bias")}  # published in F32 although the rest is not
ITEMSIZE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

RELATIVE_UPDATE = 0.35  # what attention and MLP each add to the residual stream, over its norm
SILU_GATED_RMS = 0.6  # rms of silu(a) * b for independent standard normal a and b: sqrt(E[silu(a)^2]) = 0.596
ROUTER_LOGIT_STD = 1.0
CHUNK_VALUES = 2**24

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
LARGEST_TRAINED_VOCABULARY = 4096
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}{{- raise_exception('Unknown role: ' + message['role']) }}{%- endif %}
{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

log = logging.getLogger("make_checkpoint")


@dataclass(frozen=True)
class Piece:
    """The tensor of one published name; `shape` is [out_features, in_features] for a matrix."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint: in the fused layout, the concatenation of several published ones."""

    name: str
    dtype: Literal["F8_E4M3", "BF16", "F32"]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE_BYTES[self.dtype]


def resolve_config(config: Mapping[str, Any], overrides: Mapping[str, int], fmt: Format) -> dict[str, Any]:
    """`config` with the overridden fields changed and what follows from them.

    Lists with an entry a layer are cut to length, `rotary_dim` keeps its share of `head_dim`, and the quantisation is that of `fmt`.

    Raises:
        ConfigError: an unknown model type, an override of a field that the family does not have, or one out of range; all at once.
    """
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(f"config.json: transformers knows no model_type {config.get('model_type')!r}.")
    defaults = CONFIG_MAPPING[config["model_type"]]()
    changed, problems = dict(config), []
    for option, value in overrides.items():
        known = [field for field in OVERRIDES[option] if field in config or hasattr(defaults, field)]
        if not known:
            problems.append(ConfigError(f"--{option.replace('_', '-')} {value}: a {config['model_type']} config has no {OVERRIDES[option][0]}."))
        elif value < 1:
            problems.append(ConfigError(f"--{option.replace('_', '-')} {value}: must be at least 1."))
        else:
            changed[known[0]] = value
    for field, value in config.items():
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]:
            changed[field] = value[: changed["num_hidden_layers"]]
            if len(changed[field]) < changed["num_hidden_layers"]:
                problems.append(ConfigError(f"--layers {changed['num_hidden_layers']}: {field} has entries for {len(value)} layers only."))
    if "rotary_dim" in config and "head_dim" in overrides and "rotary_dim" not in overrides:
        changed["rotary_dim"] = config["rotary_dim"] * changed["head_dim"] // config["head_dim"]
    if fmt == "bf16":
        changed.pop("quantization_config", None)
    else:
        changed.setdefault("quantization_config", DENSE_FP8)
    raise_all([*problems, *_contradictions(changed)])
    return changed


def _contradictions(config: Mapping[str, Any]) -> Iterator[ConfigError]:
    heads, groups, experts = config["num_attention_heads"], config.get("num_key_value_heads"), config.get("num_local_experts")
    if groups and heads % groups:
        yield ConfigError(f"{heads} attention heads cannot share {groups} key-value heads.", "Choose a divisor for --num-kv-heads.")
    if "head_dim" not in config and config["hidden_size"] % heads:
        yield ConfigError(f"hidden_size {config['hidden_size']} does not divide into {heads} heads.", "Give --head-dim.")
    if config.get("rotary_dim", 0) % 2 or config.get("rotary_dim", 0) > config.get("head_dim", 0):
        yield ConfigError(f"rotary_dim {config['rotary_dim']} must be even and at most head_dim {config['head_dim']}.", "Give --rotary-dim.")
    if experts and config["num_experts_per_tok"] > experts:
        yield ConfigError(f"{config['num_experts_per_tok']} experts a token out of {experts}.", "Lower --experts-per-token.")
    if config["vocab_size"] < SMALLEST_VOCABULARY:
        yield ConfigError(f"--vocab-size {config['vocab_size']}: the smallest byte-level vocabulary is {SMALLEST_VOCABULARY}.")


def plan_tensors(config: Mapping[str, Any], layout: Layout = "hub") -> Iterator[StoredTensor]:
    """Every tensor of the checkpoint of a resolved `config`, in file order; nothing is allocated.

    Raises:
        ConfigError: a matrix to be quantised has a side that is no multiple of the FP8 block, or FP8 is asked for in the fused layout.
    """
    fp8 = config.get("quantization_config")
    if fp8 and layout == "fused":
        raise ConfigError("--layout fused exists in bf16 only.", "Add --format bf16.")
    model_config = CONFIG_MAPPING[config["model_type"]].from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    for name, skeleton in model.state_dict().items():
        if name in getattr(model, "all_tied_weights_keys", {}):
            continue
        reverted = revert_weight_conversion(model, {name: skeleton})
        # Experts are stacked along dimension 0 and their matrices along dimension 1, so one expert's rows lie together.
        pieces = sorted((Piece(key, tuple(tensor.shape)) for key, tensor in reverted.items()), key=lambda piece: _expert_of(piece.name))
        if layout == "fused":
            yield StoredTensor(name, "BF16", tuple(skeleton.shape), tuple(pieces))
            continue
        kept = any(name.endswith(module) for module in F32_MODULES.get(config["model_type"], ()))
        for piece in pieces:
            if fp8 and is_block_quantised(piece):
                yield StoredTensor(piece.name, "F8_E4M3", piece.shape, (piece,))
                yield StoredTensor(f"{piece.name}_scale_inv", "F32", _grid(piece, fp8["weight_block_size"]), (piece,))
            else:
                yield StoredTensor(piece.name, "F32" if kept else "BF16", piece.shape, (piece,))
