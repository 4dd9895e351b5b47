"""What values of torch.compile's graphs are: computed as a pattern says, a norm, or in memory."""

from typing import Any, NamedTuple

import torch
from torch.fx import Node

_ATEN = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_WRITTEN = ("aten.mm.default", "m2ray.multiply_float8.default")
SHAPED = (_ATEN.reshape.default, _ATEN.view.default)
"""Operations that leave values where they are."""

_WIDE = (_CONVERT, "given", torch.float32)
_MEAN = (_ATEN.mean.dim, (_ATEN.pow.Tensor_Scalar, _WIDE, 2), [-1], True)
_SCALED = (_ATEN.mul.Tensor, _WIDE, (_ATEN.rsqrt.default, (_ATEN.add.Tensor, _MEAN, "epsilon")))
_NORMED = (_ATEN.mul.Tensor, "weight", (_CONVERT, _SCALED, torch.bfloat16))


class Norm(NamedTuple):
    """transformers' norm by the root of the mean of squares along the last axis: of what, its weight for each value there, and what is added to the mean."""

    given: Any
    weight: Node
    epsilon: float


def norm_of(node: Any) -> Norm | None:
    """The norm in bfloat16 that a value is; None if it is none."""
    found: dict[str, Any] = {}
    if not (matches(_NORMED, node, found) and is_given(found["weight"]) and isinstance(found["epsilon"], float)):
        return None
    norm = Norm(**found)
    return norm if norm.weight.meta["val"].shape == norm.given.meta["val"].shape[-1:] else None


def is_given(node: Any) -> bool:
    """Whether the graph is given it, in bfloat16."""
    return isinstance(node, Node) and node.op == "placeholder" and node.meta["val"].dtype == torch.bfloat16


def is_written(node: Any) -> bool:
    """Whether it is given to the layer, or a product, as it lies in memory in bfloat16."""
    node = unshaped(node)
    is_value = isinstance(node, Node) and (node.op == "placeholder" or str(node.target) in _WRITTEN)
    return is_value and node.meta["val"].dtype == torch.bfloat16


def unshaped(node: Any) -> Any:
    """The same values in the shape that they were made in."""
    while isinstance(node, Node) and node.target in SHAPED:
        node = node.args[0]
    return node


def takers(node: Node) -> list[Node]:
    """What is given a value, in whatever shape."""
    return [taker for user in node.users for taker in (takers(user) if user.target in SHAPED else [user])]


def written_parts(stream: Any) -> list[Node]:
    """What is in memory, and as large, of which the stream is the sum, one part or two; none if that is not so."""
    parts = stream.args if stream.target == _ATEN.add.Tensor and not stream.kwargs else [stream]
    return list(parts) if all(is_written(part) and part.meta["val"].shape == stream.meta["val"].shape for part in parts) else []


def matches(pattern: Any, value: Any, found: dict[str, Any]) -> bool:
    """Whether a value of a graph is computed exactly as a pattern says, with what `found` has already; what the pattern names is in `found` then.

    Args:
        pattern: `(operation, *arguments)` for a call with these arguments and none by name; a list, element by element; a string names what stands there,
            the same each time; anything else stands for itself.
        value: a node, or another argument of one.
    """
    if isinstance(pattern, str):
        return found.setdefault(pattern, value) is value or found[pattern] == value
    if isinstance(pattern, tuple):
        operation, *arguments = pattern
        is_call = isinstance(value, Node) and value.target == operation and not value.kwargs
        return is_call and matches(arguments, list(value.args), found)
    if isinstance(pattern, list):
        is_as_long = isinstance(value, list) and len(value) == len(pattern)
        return is_as_long and all(matches(each, given, found) for each, given in zip(pattern, value, strict=True))
    return type(value) is type(pattern) and value == pattern
