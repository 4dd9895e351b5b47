"""Which modules a configuration leaves as they were, in the three ways in which it is written. For plans without files: files show it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import regex  # re cannot be told when to give up

from m2ray.errors import CheckpointError
from m2ray.model.limits import short_repr

_PLAIN = regex.compile(r"[\w.]+")
"""Names that are no patterns but for their dots."""

LINEAR = "Linear"
"""How compressed-tensors names every linear module."""

MATCHING_S = 20.0
"""Of a core, for all that a configuration's patterns are held against: strangers write them, and some take longer than a life."""

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
    names = frozenset(names)
    plain = sorted(name for name in names if _PLAIN.fullmatch(name))
    together = ["|".join(plain)] if plain else []  # one by one, the hundreds of a release's list take minutes
    is_matched = _matching(rf"(?:{name})(?:(?<=\.)|(?=\.|$))" for name in (*together, *sorted(names.difference(plain))))
    return lambda module: not names.isdisjoint(_ends_and_runs(module)) or is_matched(module)


def _ends_and_runs(module: str) -> Iterator[str]:
    """All ends of a dotted name, and all runs of whole names in it."""
    steps = module.split(".")
    yield from (module[start:] for start in range(len(module) + 1))
    yield from (".".join(steps[start:stop]) for start in range(len(steps)) for stop in range(start + 1, len(steps) + 1))


def by_compressed_tensors(names: Sequence[str]) -> IsNamed:
    """As compressed-tensors matches (utils/match.py): an exact name, a pattern behind "re:", or the class of every linear module."""
    is_matched = _matching(name.removeprefix("re:") for name in names if name.startswith("re:"))
    exact = frozenset(name for name in names if not name.startswith("re:"))
    return lambda module: LINEAR in exact or module in exact or is_matched(module)


def by_wildcards(names: Sequence[str]) -> IsNamed:
    """As ModelOpt writes them: names with `*`, which also leave out all that is inside the module named."""
    return lambda module: any(fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") for name in names)


def _matching(patterns: Iterable[str]) -> IsNamed:
    """Whether a name begins as one of some patterns says. Raises CheckpointError, then or when it is asked: a pattern is none, or takes too long."""
    compiled = [_compiled(pattern) for pattern in patterns]
    left_s = MATCHING_S

    def is_matched(module: str) -> bool:
        nonlocal left_s
        for pattern in compiled:
            start_s = time.thread_time()  # of a busy machine's clock most would be others'
            try:
                if pattern.match(module, timeout=max(left_s, 0.001)):
                    return True
            except TimeoutError as error:
                what = f"config.json: quantization_config has the pattern {short_repr(pattern.pattern)}, which takes too long to match."
                raise CheckpointError(what, "Write the names that it stands for.") from error
            finally:
                left_s -= time.thread_time() - start_s
        return False

    return is_matched


def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise CheckpointError(f"config.json: quantization_config has the pattern {short_repr(pattern)}, which is none: {error}.") from error
