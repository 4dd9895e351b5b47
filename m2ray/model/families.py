"""config.json as transformers' configuration, and what is known of families: why some are refused by name, and where others are special.

Which of the others run is found by proof (m2ray/model/proof.py); docs/models.md lists what was found.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.errors import CheckpointError, ConfigError, raise_all
from m2ray.model.boundary import why_uncuttable
from m2ray.model.limits import parse_json, require_layers, require_sizes, short_repr
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.quantization.modelopt import HF_QUANT_CONFIG, of_hf_quant_config
from m2ray.model.towers import decoder_config, is_language_model, path_to_decoder

KEEPS_FP32 = {"minimax_m2": ("mlp.gate.weight", "mlp.e_score_correction_bias")}
"""Tensors that stay in float32 beyond what transformers keeps: a router in bfloat16 picks other experts.

MiniMax-M2's are float32 on disk, and its modelling code computes with whatever dtype they have.
"""

NEEDED_FIELDS = ("num_hidden_layers", "hidden_size", "vocab_size")
"""Without them a configuration is not that of a stack of decoder layers."""

NOT_IN_FLOAT16 = ("deepseek_v4",)
"""Families of which transformers' own model fails in float16."""

LEARNED_POSITIONS = ("biogpt", "codegen", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "openai-gpt", "opt", "trocr")
"""Families that look positions up in a table: there is none past its end, where others go on turning."""

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Fields that say how many positions a model has; the second is MPT's."""

TEXT_TOWERS = ("text_config", "decoder", "language_config", "llm_config", "thinker_config")
"""Config fields that hold the configuration of the decoder inside a larger model."""

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that are another one in all but name; transformers knows them by code in the checkpoint, which m2ray never runs."""

_CHANGING_ROPE = ("longrope", "dynamic")
"""Rotary embeddings that change for a whole batch where its longest sequence is beyond one length: a prompt's rows would depend on its neighbours.
Hunyuan's "dynamic" with an `alpha` is held to that, too, though transformers 5.24 changes nothing of it."""

_CHOOSES_KEYS = {"doge": "keep_window_size"}
"""Families whose layers attend to so many tokens at most, and choose them by numbers in which equal tokens are equal: of those at the limit a longer
batch keeps others."""

_FEWEST_INDEX_HEADS = 16
"""Of an index that chooses `index_topk` keys (DeepSeek-V3.2's, GLM-5's): with fewer the sums of their rectified products are often 0, and keys equal."""

CALLER_CHOOSES = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Fields of config.json that are not the model's: code to run from the folder, and settings of whoever saved it."""


def says_how_quantised(text: bytes) -> bool:
    """Whether config.json, or its text tower, says how weights are quantised; null says nothing. Raises CheckpointError: it is not JSON."""
    fields = parse_json(text, "config.json", _as_meant)
    places = (fields, *map(fields.get, TEXT_TOWERS)) if isinstance(fields, dict) else ()
    return any(each.get("quantization_config") is not None for each in places if isinstance(each, dict))


def parse_config(text: bytes, quantised: bytes | None = None) -> Any:
    """config.json as transformers' configuration object (PreTrainedConfig). Code from the checkpoint is never run.

    Of a multimodal model it is the whole model's; `decoder_config` of it is what m2ray runs.

    Args:
        quantised: `hf_quant_config.json`, of a model whose config.json does not say how its weights are quantised.

    Raises:
        CheckpointError: not JSON, or a model that m2ray does not run; all reasons at once.
    """
    fields = parse_json(text, "config.json", _as_meant)
    if not isinstance(fields, dict):
        raise CheckpointError("config.json is not a JSON object.", "Copy the file again.")
    if quantised is not None:
        fields["quantization_config"] = of_hf_quant_config(parse_json(quantised, HF_QUANT_CONFIG))
    require_sizes(fields)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or ALIASES.get(model_type, model_type) not in CONFIG_MAPPING:
        raise _unknown_family(model_type)
    for each in (fields, *(fields[name] for name in TEXT_TOWERS if isinstance(fields.get(name), dict))):
        if not isinstance(each.get("quantization_config") or {}, dict):
            raise CheckpointError(
                f"config.json: quantization_config = {short_repr(each['quantization_config'])} is no JSON object.",
                "Write what says how the weights are quantised (quant_method ...), or leave it out where they are not.",
            )
    config = _read_fields(ALIASES.get(model_type, model_type), fields)
    decoder = decoder_config(config)
    if decoder is not config:  # of fields without a text_config of their own transformers gives the tower the whole model's type
        decoder.model_type = type(decoder).model_type or decoder.model_type
    raise_all([*_no_decoder(config)])
    require_layers(decoder)
    raise_all(
        [
            *_contradictory_rope(config, fields),
            *_not_causal(config.to_dict()),
            *([] if decoder is config else _unsupported_structure(config)),
            *_unsupported_structure(decoder),
            *_unsupported_quantization(config),
        ]
    )
    _spell_out_partial_rotary(decoder)
    return config


def expected_rotary_dim(config: Any) -> int | None:
    """Dimensions of a head that the rotary embedding turns, where config.json says that it is not all of them."""
    rotary_dim = getattr(config, "rotary_dim", None)
    if config.model_type == "minimax_m2" and rotary_dim is not None:
        return int(rotary_dim)
    rope = getattr(config, "rope_parameters", None)
    factor = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    if factor is None or factor == 1:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * factor)


def keeps_fp32(config: Any) -> Callable[[str], bool]:
    """Whether a tensor of the model stays in float32 beyond what transformers keeps, by its name."""
    endings = KEEPS_FP32.get(config.model_type, ())
    return lambda name: name.endswith(endings)


def steady_positions(config: Any) -> int | None:
    """Tokens of the longest prompt whose rows are the same whatever stands beside it in a batch; None where those of any prompt are.

    Rotary embeddings change beyond, or what layers attend to.
    """
    changing = [rope for rope in _ropes(config) if rope.get("rope_type") in _CHANGING_ROPE]
    limits = [
        (rope["rope_type"] == "longrope" and rope.get("original_max_position_embeddings")) or config.max_position_embeddings
        for rope in changing
    ]
    if field := _CHOOSES_KEYS.get(config.model_type):
        limits.append(getattr(config, field))
    topk, heads = (getattr(config, name, None) for name in ("index_topk", "index_n_heads"))
    if topk and heads and heads < _FEWEST_INDEX_HEADS:
        limits.append(topk)
    return min(limits, default=None)


def default_max_length(config: Any) -> int:
    """The longest sequence in tokens that a model is made for; where its configuration names none, as of recurrent ones, 2**20."""
    fields = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((number for number in fields if type(number) is int and number > 0), 2**20)
    return min(steady_positions(config) or positions, positions)


def require_positions(config: Any, length: int | None, name: str = "max_length") -> None:
    """Raise ConfigError for sequences longer than the positions that a model has, of the option `name`; None is for as long as it takes."""
    positions = default_max_length(config)
    if config.model_type in LEARNED_POSITIONS and length is not None and length > positions:
        raise ConfigError(
            f"{name} = {length}, but a {config.model_type} of config.json has {positions} positions.",
            f"Set {name} to {positions} at most.",
        )


def require_dtype(config: Any, compute_dtype: str) -> None:
    """Raise ConfigError for a dtype in which transformers' own code of a family does not compute."""
    if compute_dtype == "float16" and config.model_type in NOT_IN_FLOAT16:
        raise ConfigError(
            f"compute_dtype = 'float16': transformers keeps parts of a {config.model_type} in float32 and gives them float16, which fails.",
            'Set compute_dtype = "bfloat16" or "float32".',
        )


_UNSAYABLE = ("Infinity", "-Infinity", "NaN")  # as all that config.json's values are held against a tuple: they may be lists or objects


def _as_meant(fields: dict[str, Any]) -> Any:
    """A JSON object without what its caller chooses; or the number that JSON cannot say, which transformers writes as {"__float__": "Infinity"}."""
    tag = fields.get("__float__")
    if len(fields) == 1 and tag in _UNSAYABLE:
        return float(tag)
    return {name: value for name, value in fields.items() if name not in CALLER_CHOOSES}


def _read_fields(model_type: str, fields: Mapping[str, Any]) -> Any:
    try:
        return CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(fields)))  # it writes into what is nested
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"transformers refuses config.json as a {model_type} configuration: {error}.", _dtype_remedy(fields)
        ) from error


def _dtype_remedy(fields: Mapping[str, Any]) -> str:
    """What to do where the name of a dtype is not torch's."""
    wrong = [
        f"{name} = {fields[name]!r}"
        for name in ("dtype", "torch_dtype")
        if isinstance(fields.get(name), str) and not isinstance(getattr(torch, fields[name].removeprefix("torch."), None), torch.dtype)
    ]
    return f'Instead of {wrong[0]} write torch\'s own name: "bfloat16", "float16" or "float32".' if wrong else ""


def _contradictory_rope(config: Any, fields: Mapping[str, Any]) -> list[CheckpointError]:
    """The old key `rope_scaling` replaces `rope_parameters` whole, so that its rope_theta falls back to a default without a word."""
    without = deepcopy(dict(fields))
    place, of_decoder = "", without
    for name in path_to_decoder(config):
        place, of_decoder = f"{place}{name}.", of_decoder.get(name) or {}
    old, new = of_decoder.pop("rope_scaling", None), of_decoder.get("rope_parameters")
    taken = getattr(decoder_config(config), "rope_parameters", None)
    if not (old and new) or decoder_config(_read_fields(config.model_type, without)).rope_parameters == taken:
        return []
    return [
        CheckpointError(
            f"config.json: {place}rope_scaling = {old} and {place}rope_parameters = {new} contradict each other: "
            f"transformers would take {taken}.",
            "Keep rope_parameters alone, with all that is meant.",
        )
    ]


def _spell_out_partial_rotary(config: Any) -> None:
    """Say MiniMax-M2's `rotary_dim` the way the modelling code reads it: before 5.23, transformers overlooked the field.

    Other families have a field of that name too, which says something else or nothing.
    """
    rotary_dim = getattr(config, "rotary_dim", None)
    if config.model_type == "minimax_m2" and rotary_dim is not None:
        config.rope_parameters.setdefault("partial_rotary_factor", rotary_dim / config.head_dim)


def _unknown_family(model_type: Any) -> CheckpointError:
    if model_type is None:
        return CheckpointError(
            "config.json has no model_type.", "Give a model that transformers knows; code beside a checkpoint is never run."
        )
    return CheckpointError(
        f"config.json: transformers knows no model_type {short_repr(model_type)} (installed: {transformers.__version__}), so m2ray cannot run it.",
        "Install a transformers that knows it; code beside a checkpoint is never run.",
    )


def _not_causal(fields: Mapping[str, Any], place: str = "") -> list[CheckpointError]:
    """Fields by which a model looks at later tokens, its text towers' too. Those that nobody listed are found by m2ray/model/proof.py.

    transformers takes an `is_causal` of any family at its word; `use_bidirectional_attention = "vision"` is about images alone.
    """
    reasons = [f"{name} = {fields[name]}" for name in ("is_causal", "causal") if not fields.get(name, True)]
    if fields.get("use_bidirectional_attention") not in (None, False, "vision"):
        reasons.append(f"use_bidirectional_attention = {fields['use_bidirectional_attention']}")
    problems = [
        CheckpointError(
            f"config.json: {place}{reason}: the model is not causal, a prompt's rows would depend on its padding and on later tokens.",
            "m2ray runs causal decoders only.",
        )
        for reason in reasons
    ]
    for name in TEXT_TOWERS:
        if isinstance(fields.get(name), Mapping):
            problems += _not_causal(fields[name], f"{place}{name}.")
    return problems


def _unsupported_structure(config: Any) -> list[CheckpointError]:
    return [CheckpointError(f"config.json: {reason}.", "m2ray cannot cut it into stages.") for reason in why_uncuttable(config)]


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one object for all layers, or one in it for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(nested for nested in rope.values() if isinstance(nested, dict))]


def _no_decoder(config: Any) -> Iterator[CheckpointError]:
    """Models that are no stack of decoder layers, before anything is built of them."""
    if config.is_encoder_decoder:
        yield CheckpointError(f"config.json: a {config.model_type} has an encoder beside its decoder.", "m2ray runs decoder-only models.")
    elif not is_language_model(config):
        yield CheckpointError(f"config.json: transformers has no language model of model_type {config.model_type!r}.")
    elif absent := [name for name in NEEDED_FIELDS if type(getattr(decoder_config(config), name, None)) is not int]:
        yield CheckpointError(
            f"config.json: a {config.model_type} configuration has no {' and no '.join(absent)}.", "m2ray runs one stack of decoder layers."
        )


def _unsupported_quantization(config: Any) -> list[CheckpointError]:
    try:
        layout_of(config)
    except CheckpointError as problem:
        return [problem]
    return []
