"""A transformers model without memory: the names, shapes, dtypes and places of all its tensors."""

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from m2ray.batches import LayerSpan, Role
from m2ray.errors import CheckpointError, ConfigError
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.families import keeps_fp32
from m2ray.model.towers import decoder_config, find_decoder, is_plain, model_class

QUIET = ("output_hidden_states", "output_attentions", "output_router_logits", "use_cache")
"""Config fields that make a forward pass keep more than its hidden states."""

_DOES_NOTHING = (nn.Dropout, nn.Identity)
"""When a model is evaluated."""

_MOST_RETURNED = 4
"""Of a layer's tuple: hidden states, attention, router's logits, cache."""


@dataclass(frozen=True)
class ModelTensor:
    """One parameter or persistent buffer as it is computed with."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Skeleton:
    """The whole model on the meta device, at its full length, so that every layer keeps its number.

    Attributes:
        config_on_disk: the configuration as config.json has it, its quantization included.
        model: transformers' causal language model, or a multimodal one whole.
        decoder_name: the dotted name in `model` of the module that runs.
        layers: the decoder layers, in order.
        layers_name: the list's dotted name in `model`.
        inputs: dotted names in `model` of the modules with weights that run before the first layer.
        final_norm: dotted name in `model` of the one module that runs behind the last layer, with weights or without; empty where there are
            others, or none.
        tensors: by name; tied ones once, under the name that the embedding has.
        tied: names left out of `tensors`, and the name that each shares its memory with.
        not_text: how the names of a multimodal model's tensors begin that text does not meet: vision, audio, what projects them.
    """

    config_on_disk: Any
    model: Any
    decoder_name: str
    layers: nn.ModuleList
    layers_name: str
    inputs: tuple[str, ...]
    final_norm: str
    tensors: Mapping[str, ModelTensor]
    tied: Mapping[str, str]
    not_text: tuple[str, ...]

    @property
    def decoder(self) -> Any:
        """The module that runs: token ids in, hidden states out."""
        return self.model.get_submodule(self.decoder_name)

    @property
    def config(self) -> Any:
        """The decoder's configuration as it is run."""
        return self.decoder.config

    @property
    def attn_implementation(self) -> str:
        """The attention that runs; never "auto"."""
        return str(self.config._attn_implementation)  # noqa: SLF001 - has no public name

    def needed(self, span: LayerSpan, *, with_final_norm: bool = False) -> tuple[ModelTensor, ...]:
        """What a stage of `span` computes with: its layers, the embedding if it is the first, and, if asked for, the final norm if it is the last."""
        roles = {"layer"} | ({"embedding"} if span.start == 0 else set())
        roles |= {"final_norm"} if with_final_norm and span.stop == len(self.layers) else set()
        return tuple(tensor for tensor in self.tensors.values() if tensor.role in roles and (tensor.layer is None or tensor.layer in span))

    def layer_of(self, key: str) -> int | None:
        """The decoder layer that a name belongs to, judged by the name alone: it may be one that the model has not."""
        match = self._layer_pattern.search(key)
        return int(match[1]) if match else None

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:^|\.){re.escape(self.layers_name.rpartition('.')[2])}\.(\d+)\.")


def build_skeleton(config: Any, compute_dtype: torch.dtype, attn_implementation: str = "auto") -> Skeleton:
    """Build the model of `config` on the meta device.

    Raises:
        ConfigError: the family or the dtype cannot have such attention, or its package is not installed.
        CheckpointError: transformers cannot build the model, or its layers are not one plain list.
    """
    config_on_disk, whole = config, deepcopy(config)
    config = decoder_config(whole)
    for each in (whole, config):
        if hasattr(each, "quantization_config"):
            del each.quantization_config  # m2ray dequantises at load
    for field in QUIET:
        setattr(config, field, False)
    chosen = resolve_attn_implementation(whole, attn_implementation, compute_dtype)
    config._attn_implementation = chosen  # noqa: SLF001 - the decoder's alone: another tower may not have it
    try:
        with torch.device("meta"):
            made = model_class(whole)._from_config(whole, dtype=compute_dtype)  # noqa: SLF001 - as transformers' Auto classes call it
        model = made.eval().requires_grad_(False)
    except ImportError as error:
        raise ConfigError(f"attn_implementation = {chosen!r} on this machine: {error}", 'Use "auto" or "eager".') from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        pad = getattr(config, "pad_token_id", None)
        beyond = isinstance(pad, int) and pad >= config.vocab_size
        hint = f" pad_token_id = {pad}, and vocab_size = {config.vocab_size}." if beyond else ""
        raise CheckpointError(
            f"transformers cannot build a {config.model_type} from config.json: {str(error) or type(error).__name__}.{hint}",
            "Set pad_token_id to a token of the vocabulary, or to null: no row depends on it." if beyond else "",
        ) from error
    decoder_name, decoder = find_decoder(model)
    layers_name, layers = find_layers(model)
    inputs, behind = _run_without_layers(decoder, decoder_name, layers)
    not_text = () if is_plain(whole) else _not_text(model, decoder_name)
    tensors = _list_tensors(model, decoder_name, layers_name, inputs, compute_dtype)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(not_text)}
    norm, tied = _one_norm(behind, tensors), dict(model.all_tied_weights_keys)
    return Skeleton(config_on_disk, model, decoder_name, layers, layers_name, inputs, norm, tensors, tied, not_text)


def pass_through(num_returned: int) -> Callable[..., Any]:
    """The forward pass of a decoder layer that another stage owns: its hidden states alone (0), or a tuple that begins with them."""

    def forward(hidden_BTH: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_BTH, *[None] * (num_returned - 1)) if num_returned else hidden_BTH

    return forward


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states [B, T, H] in what a decoder layer returns: alone, or at the head of a tuple.

    Raises:
        CheckpointError: there are none.
    """
    hidden_BTH = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden_BTH, torch.Tensor):
        raise CheckpointError(f"A decoder layer returns a {type(output).__name__} without hidden states.")
    return hidden_BTH


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The one list of a model's decoder that holds as many layers as the configuration says, and its dotted name in the model."""
    decoder_name, decoder = find_decoder(model)
    lists = [
        (name, module)
        for name, module in decoder.named_modules(prefix=decoder_name)
        if isinstance(module, nn.ModuleList) and len(module) == decoder.config.num_hidden_layers
    ]
    found = [each for each in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in each[1])]
    found = found or [each for each in lists if all(next(layer.children(), None) is not None for layer in each[1])]
    if len(found) != 1:
        raise CheckpointError(
            f"{type(decoder).__name__} has {len(found)} lists of {decoder.config.num_hidden_layers} decoder layers; m2ray needs exactly one."
        )
    return found[0]


def _not_text(model: Any, decoder_name: str) -> tuple[str, ...]:
    """The beginnings of the names of what a multimodal model has beside its decoder and its head, with and without the base model's."""
    head, steps = model.get_output_embeddings(), decoder_name.split(".")
    beginnings = []
    for outer in (".".join(steps[:number]) for number in range(len(steps))):
        module, place = model.get_submodule(outer), f"{outer}." if outer else ""
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        beginnings += [f"{place}{name}" for name, _ in own]
        beginnings += [f"{place}{name}." for name, child in module.named_children() if child is not head]
    beside = [each for each in beginnings if not f"{decoder_name}.".startswith(each)]
    return tuple({*beside, *(each.removeprefix(f"{model.base_model_prefix}.") for each in beside)})


def _owns_tensors(module: nn.Module) -> bool:
    return bool(module._parameters) or bool(module._buffers.keys() - module._non_persistent_buffers_set)  # noqa: SLF001 - not public


def _one_norm(behind: Sequence[str], tensors: Mapping[str, ModelTensor]) -> str:
    """The one module that runs behind the layers, if no other has weights."""
    owners = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.role == "final_norm"}
    return behind[0] if len(behind) == 1 and owners <= set(behind) else ""


def _run_without_layers(decoder: Any, decoder_name: str, layers: nn.ModuleList) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Let every layer pass its hidden states through, in the way in which the model's loop takes them back, and say what runs before and behind them.

    Whether layers return a tuple shows in one forward pass over meta tensors: what is no tuple is cut along its first axis.

    Raises:
        CheckpointError: the model does not run without its layers, whatever they return.
    """
    # A mask of four axes is taken as it is: making one looks at values, which meta tensors have not. Some families want none.
    given = {"position_ids": torch.arange(2, device="meta")[None], "attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}
    reasons = []
    for num_returned, arguments in product(range(_MOST_RETURNED + 1), (given, {})):
        for layer in layers:
            layer.forward = pass_through(num_returned)
        try:
            return _trace(decoder, decoder_name, layers, arguments)
        except (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise CheckpointError(
        f"{type(decoder).__name__} does not run without its decoder layers: {reasons[0]}", "m2ray runs one stack of decoder layers."
    )


def _trace(
    decoder: Any, decoder_name: str, layers: nn.ModuleList, arguments: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules with weights that run before the first layer, and those that run behind the last, as one forward pass over meta tensors shows.

    Names do not tell: some families embed positions too, project or normalise before the first layer; norms may have no weights.

    Raises:
        RuntimeError: a layer is given other hidden states than the first one.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [(name, module) for name, module in decoder.named_modules(prefix=decoder_name) if id(module) not in inside]
    had = [(module, set(vars(module))) for _, module in outside]
    called: list[str] = []
    shapes: list[tuple[int, ...]] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in outside
        if _owns_tensors(module) or not (isinstance(module, _DOES_NOTHING) or any(module.children()))
    ]
    hooks += [layer.register_forward_pre_hook(lambda *_: called.append("")) for layer in layers]
    hooks += [
        layer.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(_shape_given(args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.inference_mode(), torch.device("meta"), NoValues():  # type: ignore[no-untyped-call]
            decoder(input_ids=torch.zeros(3, 2, dtype=torch.long), **arguments)
    finally:
        for hook in hooks:
            hook.remove()
        for module, names in had:
            _forget_tensors(module, names)
    if len(set(shapes)) != 1 or len(shapes[0]) < 3:
        raise RuntimeError(f"its layers are given hidden states of shapes {shapes}")
    first, behind = called.index(""), len(called) - called[::-1].index("")
    owners = {name for name, module in outside if _owns_tensors(module)}
    return tuple(name for name in called[:first] if name in owners), tuple(called[behind:])


_ASK_FOR_A_VALUE = (
    torch.ops.aten._local_scalar_dense.default,  # noqa: SLF001 - torch's name; in inference mode it has the other two
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
)


class NoValues(TorchDispatchMode):
    """Says 0 where a model's code asks for a value of a meta tensor, which has none: how long the longest prompt is (longrope)."""

    def __torch_dispatch__(self, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in _ASK_FOR_A_VALUE and args[0].is_meta:
            return 0
        return function(*args, **(kwargs or {}))


def _forget_tensors(module: nn.Module, had: AbstractSet[str]) -> None:
    """Drop what a forward pass has kept for the next one in attributes that were not there (longrope's second frequencies): it has no values."""
    for name in vars(module).keys() - had:
        if isinstance(getattr(module, name), torch.Tensor):
            delattr(module, name)


def _shape_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Of the hidden states that a layer is given."""
    return tuple((args[0] if args else kwargs["hidden_states"]).shape)


def _list_tensors(
    model: Any, decoder_name: str, layers_name: str, inputs: tuple[str, ...], compute_dtype: torch.dtype
) -> dict[str, ModelTensor]:
    # What transformers' own loading keeps in float32 at this dtype, by a rule without a public name, and what m2ray adds for the family.
    patterns = (pattern.replace("*", ".*") for pattern in model._get_dtype_plan(compute_dtype))  # noqa: SLF001
    of_transformers, of_m2ray = re.compile("|".join(patterns) or r"(?!)"), keeps_fp32(decoder_config(model.config))
    return {
        name: ModelTensor(
            name,
            *_place(decoder_name, layers_name, inputs, name),
            tuple(tensor.shape),
            _dtype(tensor, bool(of_transformers.search(name)) or of_m2ray(name)),
        )
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }


def _dtype(tensor: torch.Tensor, keeps_fp32: bool) -> torch.dtype:  # noqa: FBT001 - private
    return torch.float32 if keeps_fp32 and tensor.is_floating_point() else tensor.dtype


def _place(decoder_name: str, layers_name: str, inputs: tuple[str, ...], name: str) -> tuple[Role, int | None]:
    if name.startswith(f"{layers_name}."):
        return "layer", int(name.removeprefix(f"{layers_name}.").partition(".")[0])
    if name.rpartition(".")[0] in inputs:
        return "embedding", None
    return ("final_norm" if name.startswith(f"{decoder_name}.") else "head"), None
