"""A tiny copy of a configuration: every field kept but sizes, so that what it asks of the model's code can be tried in a moment."""

import re
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

WINDOW = 6
"""Of attention in a tiny copy, at most: shorter than the prompts that prove it, so that it acts."""

_VOCABULARY = 128
_WIDTH = 64
_RANK = 32
_KV_HEADS = 2
_WIDTH_PER_HEAD = 16

# Numbers that say which layers are of which kind; larger ones say something else.
_LAYER_RULE = re.compile(r"first|step|interval|pattern|period|freq|every|num_dense|offset|start")
_LARGEST_RULE = 12

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_WINDOWS = ("sliding_window", "attention_chunk_size")


def tiny_copy(config: Any) -> Any:
    """The configuration with few and narrow layers: one or two of every kind, heads and experts in their old ratios, short windows.

    What turns or scales (head sizes, rotary embeddings, multipliers, norms) is left as it is; so is a size of unknown name.
    """
    tiny = deepcopy(config)
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    _keep_layers(tiny)
    _narrow(tiny, config)
    _keep_experts(tiny, config)
    for name in _WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(tiny, name, min(getattr(config, name), WINDOW))
    return tiny


def kept_layers(config: Any) -> list[int]:
    """Numbers of the layers that a tiny copy keeps: the first ones, two more than the largest number by which a rule of the
    configuration counts layers (an interval, the first dense ones), and every later one whose kind follows the kind before it for the first time.
    """
    lists = _layer_lists(config)
    kinds = [tuple(str(values[layer]) for values in lists.values()) for layer in range(config.num_hidden_layers)]
    numbers = [
        number
        for name, value in vars(config).items()
        if _LAYER_RULE.search(name) or name.endswith("_layers")
        for number in (value if isinstance(value, list | tuple) else [value])
        if type(number) is int and number <= _LARGEST_RULE and name != "num_hidden_layers"
    ]
    first = min(max([0, *numbers]) + 2, len(kinds))
    kept = list(range(first))
    seen = set(pairwise(kinds[:first]))
    for layer, pair in enumerate(pairwise(kinds), 1):
        if layer >= first and pair not in seen:
            seen.add(pair)
            kept.append(layer)
    return kept


def _keep_layers(tiny: Any) -> None:
    kept = kept_layers(tiny)
    for name, values in _layer_lists(tiny).items():
        setattr(tiny, name, [values[layer] for layer in kept])
    tiny.num_hidden_layers = len(kept)


def _layer_lists(config: Any) -> dict[str, Sequence[Any]]:
    """The fields with one value a layer."""
    return {
        name: value for name, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
    }


def _narrow(tiny: Any, config: Any) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads == 0:
        tiny.num_attention_heads = min(kv_heads, _KV_HEADS) * (heads // kv_heads)
        if getattr(config, "num_key_value_heads", None):
            tiny.num_key_value_heads = min(kv_heads, _KV_HEADS)
    width = config.hidden_size // heads  # is a head's size where none is given
    tiny.hidden_size = tiny.num_attention_heads * (min(width, _WIDTH_PER_HEAD) if getattr(config, "head_dim", None) else width)
    tiny.vocab_size = min(config.vocab_size, _VOCABULARY)
    for name, value in list(vars(config).items()):
        if type(value) is not int:
            continue
        if name.endswith("_token_id"):
            setattr(tiny, name, min(value, tiny.vocab_size - 1))
        elif re.search(r"intermediate_size|ffn_dim|n_inner", name):
            setattr(tiny, name, min(value, _WIDTH))
        elif name.endswith("lora_rank"):
            setattr(tiny, name, min(value, _RANK))
        elif name.endswith(("_proj_dim", "embedding_size")) and value == config.hidden_size:
            setattr(tiny, name, tiny.hidden_size)


def _keep_experts(tiny: Any, config: Any) -> None:
    """Twice as many experts as a token takes, and four in each group that a router first chooses among."""
    chosen = max((getattr(config, name, None) or 1 for name in _CHOSEN_EXPERTS), default=1)
    groups = getattr(config, "n_group", None) or 1
    enough = -(-max(2 * chosen, 4 * groups) // groups) * groups
    for name in _EXPERTS:
        value = getattr(config, name, None)
        if type(value) is int:
            setattr(tiny, name, min(value, enough))
