"""Which modules a configuration leaves as they were, in the three ways in which it is written. For plans without files: files show it."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from m2ray.errors import CheckpointError
from m2ray.model.limits import short_repr

IsNamed = Callable[[str], bool]
"""Whether a module, by its dotted name, is among those that a list names."""


def names_of(declared: Any, *fields: str) -> list[str]:
    """The first of these fields that is there, as a list of names. Raises CheckpointError if it is none."""
    for field in fields:
        names = declared.get(field)
        if names is not None:
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"config.json: quantization_config.{field} = {short_repr(names)} is no list of names.")
            return names
    return []


def by_transformers(names: Iterable[str]) -> IsNamed:
    """As transformers matches (quantizers_utils.should_convert_module): from the start to the end of a module's name, or its end; also as a
    run of whole names, as the engines do for which such lists were written first.
    """
    names = tuple(names)
    patterns = tuple(_compiled(rf"(?:{name})(?:(?<=\.)|(?=\.|$))") for name in names)
    return lambda module: (
        any(pattern.match(module) for pattern in patterns) or any(module.endswith(name) or f".{name}." in f".{module}." for name in names)
    )


def by_compressed_tensors(names: Sequence[str]) -> IsNamed:
    """As compressed-tensors matches (utils/match.py): an exact name, a pattern behind "re:", or the class of every linear module."""
    patterns = tuple(_compiled(name.removeprefix("re:")) for name in names if name.startswith("re:"))
    exact = frozenset(name for name in names if not name.startswith("re:"))
    return lambda module: "Linear" in exact or module in exact or any(pattern.match(module) for pattern in patterns)


def by_wildcards(names: Sequence[str]) -> IsNamed:
    """As ModelOpt writes them: names with `*`, which also leave out all that is inside the module named."""
    return lambda module: any(fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") for name in names)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"config.json: quantization_config has the pattern {short_repr(pattern)}, which is none: {error}.") from error
