"""A tiny copy of a multimodal model's configuration: a tiny decoder, and around it other towers that are built and never run."""

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from m2ray.model.tiny import tiny_copies
from m2ray.model.towers import decoder_config, is_plain, path_to_decoder

_HEADS = 2
_WIDTH = 64

_DEPTH = re.compile(r"depth|(num|n)_(\w+_)?layers?|\w*layers")
_HEADS_NAMES = ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head")
_HIDDEN_NAMES = ("hidden_size", "embed_dim", "d_model", "hidden_dim", "width")
_INNER = re.compile(r"\w*(intermediate|ffn|feed_forward)\w*|mlp_dim")


def tiny_wholes(config: Any) -> Iterator[Any]:
    """Tiny copies of a configuration, a plain decoder's or a multimodal model's: first narrow ones, then ones of the old widths."""
    narrow, wide = tiny_copies(decoder_config(config))
    if is_plain(config):
        yield from (narrow, wide)
        return
    yield _around(config, narrow, narrows=True)
    yield _around(config, narrow, narrows=False)
    yield _around(config, wide, narrows=True)


def _around(config: Any, tiny: Any, *, narrows: bool) -> Any:
    """A multimodal model's configuration with a tiny decoder, and one layer in each of its other towers."""
    whole, path = deepcopy(config), path_to_decoder(config)
    if hasattr(whole, "quantization_config"):
        del whole.quantization_config
    hidden_size = decoder_config(config).hidden_size
    holder = whole
    for name in path[:-1]:
        holder = getattr(holder, name)
    setattr(holder, path[-1], deepcopy(tiny))
    for each in _towers(whole):
        if narrows:
            _narrow(each)
        for name, value in list(vars(each).items()):
            if isinstance(value, list) and value and all(type(number) is int for number in value) and re.search("index|layers", name):
                setattr(each, name, [0])
            elif type(value) is int and value > 1 and _DEPTH.fullmatch(name):
                setattr(each, name, 1)
    for each in (whole, holder, *_towers(whole)):
        for name, value in list(vars(each).items()):
            if value == hidden_size and re.search(r"_(size|dim)$", name):  # what is as wide as the decoder was
                setattr(each, name, tiny.hidden_size)
    return whole


def _towers(config: Any) -> Iterator[Any]:
    """Every configuration inside one, but for its decoder and those that hold it."""
    wanted = decoder_config(config)
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is None or inner is wanted:
            continue
        if is_plain(inner) or decoder_config(inner) is not wanted:
            yield inner
        yield from _towers(inner) if decoder_config(inner) is wanted else ()


def _narrow(tower: Any) -> None:
    """Two heads of the old size, and everything that was as wide as the tower as wide as it is now."""
    heads = next((name for name in _HEADS_NAMES if type(getattr(tower, name, None)) is int), "")
    hidden = next((name for name in _HIDDEN_NAMES if type(getattr(tower, name, None)) is int), "")
    if not (heads and hidden) or getattr(tower, hidden) % getattr(tower, heads):
        return
    before, number = getattr(tower, hidden), min(getattr(tower, heads), _HEADS)
    width = before // getattr(tower, heads) * number
    for name, value in list(vars(tower).items()):
        if type(value) is int and value == before and name != "vocab_size":
            setattr(tower, name, width)
        elif type(value) is int and _INNER.fullmatch(name):
            setattr(tower, name, min(value, _WIDTH))
        elif type(value) is int and name in (heads, "num_key_value_heads"):
            setattr(tower, name, number)
