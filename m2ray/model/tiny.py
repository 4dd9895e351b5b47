"""Tiny copies of a configuration: every field kept but sizes, so that what it asks of the model's code can be tried in a moment."""

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

WINDOW = 6
"""Of attention in a tiny copy, at most: shorter than the prompts that prove it, so that it acts."""

VOCABULARY = 128
_WIDTH = 64
_RANK = 32
_KV_HEADS = 2
_NAMES_OF_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
"""The second is Falcon's."""

_MOST_SHARED, _FEWER_SHARED = 16, 4
_WIDE = 2048
_ALIGNED = 8
"""Widths keep their remainder of it: kernels for experts take multiples of 16 bytes alone."""
_INDEX_HEADS = 16
_WIDTH_OF_HEADS = 256
_BLOCK, _BLOCKS = 4, 2
_CHUNK, _STATE, _GROUPS, _LINEAR_HEADS = 8, 16, 2, 4

# Numbers that say which layers are of which kind; larger ones say something else.
_LAYER_RULE = re.compile(r"first|step|interval|pattern|period|freq|every|num_dense|offset|start|_layers$")
_LARGEST_RULE = 12
_LAYER_NUMBERS = re.compile(r"_layers$|layer_(ids|indices)$|_idxs$")
_FEWEST_LAYERS = 3
_FEW_LAYERS = 8
"""So many are all kept: a list of that length may be of anything else than layers (Falcon-H1's five multipliers)."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_KEY_HEADS = {"linear_num_key_heads": "linear_num_value_heads"}
_MIXER_HEADS = {
    "mamba_n_heads": "mamba_d_head",
    "mamba_num_heads": "mamba_head_dim",
    "num_heads": "head_dim",
    "n_mamba_heads": "mamba_headdim",
}

_AT_MOST = {
    r"intermediate_size|ffn|n_inner|d_inner|dim_ff|d_ff|dff|feed_forward_size|shared_expert_dim": _WIDTH,
    r"_rank$": _RANK,
    r"window_size$|sliding_window$|attention_chunk_size$|local_attention$|compress_rates$": WINDOW,
    r"index_(topk|kpool)$": WINDOW // 2,
    r"chunk_size$": _CHUNK,
    r"d_state$|state_size$": _STATE,
    r"n_?groups$": _GROUPS,
    r"linear_num_heads$": _LINEAR_HEADS,
    r"index_block_size$": _BLOCK,
    r"index_topk_blocks$": _BLOCKS,
    r"index_n_heads$": _INDEX_HEADS,
    r"vocab": VOCABULARY,
    r"_token_id$|_token_index$|^pad_id$": VOCABULARY - 1,
}
"""By a field's name, what it is at most in a tiny copy."""

_LIKE_HIDDEN = re.compile(r"hidden_size|_width$|proj_dim$|embed\w*_(dim|size)$|^d_model$|embedding_dim$")
"""Fields that go with hidden_size where they are a multiple of it."""


def tiny_copies(config: Any) -> Iterator[Any]:
    """The configuration with few layers, few experts and short windows, and narrow: by several rules, of which most families take the first.

    The last keeps all widths. One or two layers of every kind are kept, heads and experts in their old ratios. What turns or scales (head sizes, rotary embeddings,
    multipliers, norms) is left as it is; so is a size of unknown name.
    """
    yield _copy(config, lambda heads, width, has_own: heads * (min(width, 16, max(_WIDTH_OF_HEADS // heads, 4)) if has_own else width))
    yield _copy(config, lambda heads, width, _: heads * min(width, 32))
    yield _copy(config, lambda heads, width, _: heads * (_size(config, "head_dim") or width))
    yield _copy(config, None)


def kept_layers(config: Any) -> list[int]:
    """Numbers of the layers that a tiny copy keeps: the first ones, two more than the largest number by which a rule of the
    configuration counts layers (an interval, the first dense ones), and every later one whose kind follows the kind before it for the first time.
    Of few layers all.
    """
    if config.num_hidden_layers <= _FEW_LAYERS:
        return list(range(config.num_hidden_layers))
    lists, named = _layer_lists(config), _layer_numbers(config)
    told_apart = [*lists.values(), getattr(config, "kv_sharing_modes", [None] * config.num_hidden_layers)]
    kinds = [
        (*(str(values[layer]) for values in told_apart), *(layer in numbers for numbers in named.values()))
        for layer in range(config.num_hidden_layers)
    ]
    number_of_layers = {"num_hidden_layers", (config.attribute_map or {}).get("num_hidden_layers")}
    numbers = [
        number
        for name, value in vars(config).items()
        if _LAYER_RULE.search(name) and name not in number_of_layers and name not in named
        for number in (value if isinstance(value, list | tuple) else [value])
        if type(number) is int and number <= _LARGEST_RULE
    ]
    first = min(max([_FEWEST_LAYERS - 2, *numbers]) + 2, len(kinds))
    kept = list(range(first))
    seen = set(pairwise(kinds[:first]))
    for layer, pair in enumerate(pairwise(kinds), 1):
        if layer >= first and pair not in seen:
            seen.add(pair)
            kept.append(layer)
    return kept


def _copy(config: Any, hidden_size: Callable[[int, int, bool], int] | None) -> Any:
    """By a rule for the hidden size, from the copy's heads, the original's width for each of its own, and whether heads have a size of their own."""
    tiny = deepcopy(config)
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    _keep_layers(tiny)
    if hidden_size is not None:
        _narrow(tiny, config, hidden_size)
    _cap(tiny, config)
    _keep_experts(tiny, config)
    return tiny


def _keep_layers(tiny: Any) -> None:
    kept = kept_layers(tiny)
    lists, named = _layer_lists(tiny), _layer_numbers(tiny)
    for name, values in lists.items():
        setattr(tiny, name, [values[layer] for layer in kept])
    for name, numbers in named.items():
        setattr(tiny, name, [kept.index(number) for number in numbers if number in kept])
    if number := _size(tiny, "num_kv_shared_layers"):
        tiny.num_kv_shared_layers = sum(layer >= tiny.num_hidden_layers - number for layer in kept)
    own = (tiny.to_dict().get("per_layer_config") or {}).items()
    tiny.num_hidden_layers = len(kept)
    if own:
        tiny.per_layer_config = {kept.index(int(layer)): fields for layer, fields in own if int(layer) in kept}


def _layer_lists(config: Any) -> dict[str, Sequence[Any]]:
    """The fields with one value a layer."""
    numbers, lists = _layer_numbers(config), {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return {name: value for name, value in lists.items() if len(value) == config.num_hidden_layers and name not in numbers}


def _layer_numbers(config: Any) -> dict[str, Sequence[int]]:
    """The fields that name layers by their numbers, in ascending order."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple) and _LAYER_NUMBERS.search(name)}
    return {
        name: value
        for name, value in lists.items()
        if all(type(number) is int and 0 <= number < config.num_hidden_layers for number in value)
        and all(one < other for one, other in pairwise(value))
    }


def _narrow(tiny: Any, config: Any, hidden_size: Callable[[int, int, bool], int]) -> None:
    """Few heads in their old ratios, a hidden size to go with them, and what follows from it."""
    heads = _size(config, "num_attention_heads")
    if heads:
        width = config.hidden_size // heads  # is a head's size where none is given
        has_own_width = bool(_size(config, "head_dim") or _size(config, "qk_rope_head_dim"))
        kv_name = next((name for name in _NAMES_OF_KV_HEADS if _size(config, name)), None)
        kv_heads = _size(config, kv_name) if kv_name else heads
        if heads % kv_heads == 0:
            shared_by, few = heads // kv_heads, min(kv_heads, _KV_HEADS)
            most = _MOST_SHARED if has_own_width or few * _MOST_SHARED * width <= _WIDE else _FEWER_SHARED
            tiny.num_attention_heads = few * (most if shared_by % most == 0 else shared_by)
            if kv_name:
                setattr(tiny, kv_name, few)
        narrow = hidden_size(tiny.num_attention_heads, width, has_own_width)
        tiny.hidden_size = narrow + (config.hidden_size - narrow) % _ALIGNED if has_own_width else narrow
    else:
        tiny.hidden_size = min(config.hidden_size, 2 * _WIDTH)
    for name in list(vars(config)):
        if _LIKE_HIDDEN.search(name) and _size(config, name) % config.hidden_size == 0 and _size(config, name):
            setattr(tiny, name, _size(config, name) // config.hidden_size * tiny.hidden_size)
    for keys, values in _KEY_HEADS.items():
        if number := _size(config, keys):
            setattr(tiny, keys, min(number, _KV_HEADS))
            setattr(tiny, values, _size(config, values) // number * min(number, _KV_HEADS))
    _fit_mixers(tiny, config)


def _fit_mixers(tiny: Any, config: Any) -> None:
    """Heads of state space layers, which together are as wide as a multiple of the hidden size."""
    for number, size in _MIXER_HEADS.items():
        heads, width = _size(config, number), _size(config, size)
        inner = heads * width
        if inner and inner == _size(config, "mamba_d_ssm"):
            setattr(tiny, number, min(heads, _LINEAR_HEADS))
            tiny.mamba_d_ssm = getattr(tiny, number) * width
        elif inner and inner % config.hidden_size == 0:
            inner = inner // config.hidden_size * tiny.hidden_size
            fewer = min(heads, _LINEAR_HEADS)
            setattr(tiny, number, fewer)
            setattr(tiny, size, inner // fewer)


def _cap(tiny: Any, config: Any) -> None:
    for name, value in list(vars(config).items()):
        limit = next((limit for pattern, limit in _AT_MOST.items() if re.search(pattern, name)), None)
        if limit is not None and type(value) is int:
            setattr(tiny, name, min(value, limit + (value % _ALIGNED if limit == _WIDTH else 0)))
        elif limit is not None and isinstance(value, list) and all(type(each) is int for each in value):
            setattr(tiny, name, [min(each, limit) for each in value])
        elif limit is not None and isinstance(value, dict) and all(type(each) is int for each in value.values()):
            setattr(tiny, name, {key: min(each, limit) for key, each in value.items()})


def _size(config: Any, name: str) -> int:
    """A field that is a positive number, of the first layer where they differ; 0 where there is none."""
    value = getattr((getattr(config, "per_layer_config", None) or [config])[0], name, None)
    return value if type(value) is int and value > 0 else 0


def _keep_experts(tiny: Any, config: Any) -> None:
    """Twice as many experts as a token takes, and four in each group that a router first chooses among."""
    chosen = max(max(_of_layers(getattr(config, name, None))) or 1 for name in _CHOSEN_EXPERTS)
    groups = getattr(config, "n_group", None) or 1
    enough = -(-max(2 * chosen, 4 * groups) // groups) * groups
    for name in _EXPERTS:
        value = getattr(tiny, name, None)
        if type(value) is int:
            setattr(tiny, name, min(value, enough))
        elif isinstance(value, list):
            setattr(tiny, name, [min(each, enough) for each in value])


def _of_layers(value: Any) -> Sequence[int]:
    """A number that is one for all layers or, as of Hunyuan-A13B's experts, one for each; 0 where there is none."""
    return value if isinstance(value, list) and value else [value or 0]
