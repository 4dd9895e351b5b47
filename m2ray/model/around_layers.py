"""What runs around a model's decoder layers, as one forward pass over meta tensors shows while every layer passes its hidden states through."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2ray.errors import CheckpointError

_DOES_NOTHING = (nn.Dropout, nn.Identity)
"""When a model is evaluated."""

_MOST_RETURNED = 4
"""Of a layer's tuple: hidden states, attention, router's logits, cache."""


def run_without_layers(decoder: Any, decoder_name: str, layers: nn.ModuleList) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
            layer.forward = _pass_through(num_returned)
        try:
            return _trace(decoder, decoder_name, layers, arguments)
        except (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise CheckpointError(
        f"{type(decoder).__name__} does not run without its decoder layers: {reasons[0]}", "m2ray runs one stack of decoder layers."
    )


def _pass_through(num_returned: int) -> Callable[..., Any]:
    """The forward pass of a decoder layer that another stage owns: its hidden states alone (0), or a tuple that begins with them."""

    def forward(hidden_BTH: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_BTH, *[None] * (num_returned - 1)) if num_returned else hidden_BTH

    return forward


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
    """Says 0 where a model's code asks for a value of a meta tensor, which has none: how long the longest prompt is (longrope, dynamic)."""

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


def _owns_tensors(module: nn.Module) -> bool:
    return bool(module._parameters) or bool(module._buffers.keys() - module._non_persistent_buffers_set)  # noqa: SLF001 - not public
