"""The decoder inside a multimodal model: its configuration, its module in transformers' model, the tokens that stand for what is no text.

Of a plain decoder it is the model itself. Nothing behind these functions has to know of the difference.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)

from m2ray.errors import CheckpointError

_PLACEHOLDER = re.compile(
    r"(?:image|video|audio|vision|visual|speech|sound|media|img)_(?:(?:placeholder|patch|pad|context|latent)_)?token_(?:id|index)|image_patch_id"
)
"""Names of the fields that hold a token id in whose place a model puts what is no text."""


def decoder_config(config: Any) -> Any:
    """The configuration of the decoder that m2ray runs: a multimodal model's text tower's, or `config` itself.

    Raises:
        CheckpointError: it names several.
    """
    if config.is_encoder_decoder:
        return config
    try:
        found = config.get_text_config(decoder=True)
    except ValueError as error:
        raise CheckpointError(f"config.json: which decoder of a {config.model_type} is meant cannot be told: {error}") from error
    return found if isinstance(found, PreTrainedConfig) else config  # some families keep a field of such a name as it is


def is_plain(config: Any) -> bool:
    """Whether a configuration is a decoder's itself."""
    return decoder_config(config) is config


def path_to_decoder(config: Any) -> tuple[str, ...]:
    """The fields that lead from a configuration to its decoder's: none for a plain decoder."""
    wanted = decoder_config(config)
    if is_plain(config):
        return ()
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is wanted:
            return (name,)
        if inner is not None and decoder_config(inner) is wanted:
            return (name, *path_to_decoder(inner))
    raise CheckpointError(
        f"config.json: transformers keeps the decoder of a {config.model_type} in no field of it.", "m2ray does not run it."
    )


def is_language_model(config: Any) -> bool:
    """Whether transformers has a model of this configuration that gives text."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def model_class(config: Any) -> Any:
    """The class of transformers that builds and loads the whole model of a configuration."""
    is_causal, is_multimodal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return (MODEL_FOR_MULTIMODAL_LM_MAPPING if is_multimodal and not (is_causal and is_plain(config)) else MODEL_FOR_CAUSAL_LM_MAPPING)[
        type(config)
    ]


def decoder_class(config: Any) -> Any:
    """The class whose attributes say which attention the decoder can run with; None for one that transformers does not list."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    configs = (decoder_config(config), config)
    return next((mapping[type(each)] for each in configs for mapping in mappings if type(each) in mapping), None)


def find_decoder(model: Any) -> tuple[str, Any]:
    """The dotted name and the module that runs: the base of a causal language model, the text tower of a multimodal one.

    Raises:
        CheckpointError: the model keeps its text tower where none is looked for.
    """
    wanted = decoder_config(model.config)
    if is_plain(model.config):
        return _base_of(model)
    decoder = model.get_decoder()
    while (inner := _base_of(decoder)[1]) is not decoder:
        decoder = inner
    if type(decoder.config) is not type(wanted):
        raise CheckpointError(
            f"In {type(model).__name__} m2ray finds no decoder of model_type {wanted.model_type}.", "m2ray does not run it."
        )
    return next(name for name, module in model.named_modules() if module is decoder), decoder


def _base_of(model: Any) -> tuple[str, Any]:
    """What a language model calls its base, or, where it calls itself so, the child of the family's own base class."""
    if model.base_model is not model:
        return model.base_model_prefix, model.base_model
    base_class = MODEL_MAPPING.get(type(model.config), ())
    return next(((name, child) for name, child in model.named_children() if isinstance(child, base_class)), ("", model))


def placeholder_tokens(config: Any) -> dict[int, str]:
    """Token ids that stand for an image, a video or a sound, with config.json's field that says so: no prompt of text has them."""
    return {token_id: field for field, token_id in _placeholders(config.to_dict())}


def _placeholders(fields: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _placeholders(value, f"{place}{name}.")
        elif type(value) is int and value >= 0 and _PLACEHOLDER.fullmatch(name):
            yield f"{place}{name}", value
