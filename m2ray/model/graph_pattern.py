"""What a graph of torch.compile's computes, held against a pattern."""

from typing import Any

from torch.fx import Node


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
