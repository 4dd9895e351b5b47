"""A checkpoint's layout: the methods that its configuration names, which of its tensors belong together, and which modules are quantised."""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from m2ray.errors import CheckpointError
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.skipped import IsNamed
from m2ray.model.quantization.stored import MISMATCH, Method, Part, StoredTensor, part_key, whole_key

MethodOf = Callable[[str], Method | None]
"""The method of a module of a decoder layer that has weights, by its name; None where the configuration names none."""

Form = tuple[object, ...]
"""The endings of a tensor's keys, with the dtype and the shape of each."""

UNREAD = re.compile(
    r"(?:\.|_)(?:activation|input|output|q|k|v|kv)_(?:global_)?scale(?:_inv|_ub)?$|\.(?:activation|input)_scale_inv$|\.qscale_(?:act|input)$"
)
"""Scales by which engines quantise activations and caches; weights do not need them."""

_ALWAYS = ("_scale_inv", "_scale")
"""Endings of scales, which are never read as tensors of their own."""


@dataclass(frozen=True)
class Layout:
    """What a configuration says of how weights are packed.

    Attributes:
        methods: in the order in which they are asked whether they take a tensor; none where nothing is quantised.
        method_of: which of several methods that take its dtype a tensor has; and, for a plan without files, whether it has one.
        is_left_out: whether a module stays as it was, whatever `method_of` says. For a plan without files: files show it.
    """

    methods: tuple[Method, ...]
    method_of: MethodOf
    is_left_out: IsNamed = lambda _: False

    def group(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The keys of each tensor's parts, by the tensor's own key; judged by names alone.

        `X.weight_scale_inv` belongs to `X.weight`, if that is there, and `X.qscale_weight` too.
        """
        keys = set(keys)
        groups: dict[str, list[str]] = {}
        for key in sorted(keys):
            groups.setdefault(self._whole(key, keys, groups), []).append(key)
        return groups

    def _whole(self, key: str, keys: AbstractSet[str], known: Container[str]) -> str:
        for ending in self._endings:
            if key.endswith(ending):
                whole = whole_key(key, ending)
                if whole in known or any(part_key(whole, first) in keys for first in self._first_endings):
                    return whole
        return key

    def stored(self, headers: Mapping[str, TensorHeader]) -> dict[str, StoredTensor]:
        """Every tensor of these headers, by the key that it has where nothing is quantised. What cannot be read says why in its `problems`."""
        tensors: dict[str, StoredTensor] = {}
        alike: dict[Form, StoredTensor] = {}  # a layer has hundreds of experts of one form
        for whole, keys in self.group(headers).items():
            form = _form(whole, keys, headers)
            if form in alike:
                tensors[whole] = _as(alike[form], whole, headers)
                continue
            found = {key: headers[key] for key in keys}
            stored = self._store(whole, found)
            tensors.update(stored)
            if self._is_told_by_form(whole, found, stored):
                alike[form] = stored[whole]
        return tensors

    def _is_told_by_form(self, whole: str, found: Mapping[str, TensorHeader], stored: Mapping[str, StoredTensor]) -> bool:
        """Whether every tensor of this one's form is stored as it is: by the only method that takes it, and nothing is wrong with it."""
        is_right = all(each.unpack and not each.problems for each in stored.values())
        return is_right and sum(_takes(method, whole, found) for method in self.methods) == 1

    def _store(self, whole: str, found: Mapping[str, TensorHeader]) -> dict[str, StoredTensor]:
        if len(found) == 1 and whole in found and found[whole].dtype.itemsize > 1:
            return {whole: plain(whole, found[whole])}
        taking = [method for method in self.methods if _takes(method, whole, found)]
        if not taking:
            return _unpacked(whole, found)
        named = self.method_of(whole.removesuffix(".weight")) if len(taking) > 1 else None
        tensors = [_by_method(method, whole, found) for method in ([named] if named in taking else taking)]
        return {whole: next((tensor for tensor in tensors if not tensor.problems), tensors[0])}

    @cached_property
    def _endings(self) -> tuple[str, ...]:
        """Of all parts, the longest first."""
        of_methods = {ending for method in self.methods for endings in method.parts.values() for ending in endings}
        return tuple(sorted({*of_methods, *_ALWAYS} - {""}, key=len, reverse=True))

    @cached_property
    def _first_endings(self) -> tuple[str, ...]:
        """Of the parts that hold values, and that of a tensor that is not packed."""
        return tuple({"": None, **{ending: None for method in self.methods for ending in next(iter(method.parts.values()))}})


def _form(whole: str, keys: Iterable[str], headers: Mapping[str, TensorHeader]) -> Form:
    """All that a method looks at of a tensor, but for its name, which it only hands on."""
    stem_chars = len(whole.removesuffix(".weight"))
    found = ((key, headers[key]) for key in keys)
    return whole[stem_chars:], *((key[stem_chars:], header.dtype, header.shape) for key, header in found)


def _as(other: StoredTensor, whole: str, headers: Mapping[str, TensorHeader]) -> StoredTensor:
    """The tensor `whole`, stored as another one of its form."""
    stem, stem_chars = whole.removesuffix(".weight"), len(other.key.removesuffix(".weight"))
    parts = tuple(Part(name, key := stem + its_key[stem_chars:], headers[key], rows) for name, its_key, _, rows in other.parts)
    return StoredTensor(whole, other.shape, parts, other.unpack, other.swapped, (), other.method)


def plain(key: str, header: TensorHeader) -> StoredTensor:
    """A tensor that is not packed."""
    return StoredTensor(key, header.shape, (Part("values", key, header, 1 if header.shape else 0),))


def _takes(method: Method, whole: str, found: Mapping[str, TensorHeader]) -> bool:
    firsts = [key for ending in next(iter(method.parts.values())) if (key := part_key(whole, ending)) in found]
    return bool(firsts) and method.takes(found[firsts[0]])


def _by_method(method: Method, whole: str, found: Mapping[str, TensorHeader]) -> StoredTensor:
    parts: dict[str, tuple[str, TensorHeader]] = {}
    left = dict(found)
    for name, endings in method.parts.items():
        there = [key for ending in endings if (key := part_key(whole, ending)) in left]
        if there:
            parts[name] = there[0], left.pop(there[0])
    stored = method.store(whole, parts)
    if not left:
        return stored
    what = f"{', '.join(sorted(left))}: {whole} as {method.name} has no such part."
    return stored._replace(problems=(*stored.problems, CheckpointError(what, MISMATCH)))


def _unpacked(whole: str, found: Mapping[str, TensorHeader]) -> dict[str, StoredTensor]:
    """What no method takes: tensors of their own, but for scales."""
    scales = [key for ending in _ALWAYS if (key := whole + ending) in found] if whole in found else []
    tensors = {key: plain(key, header) for key, header in found.items() if key not in scales}
    if scales:
        header = found[whole]
        what = (
            f"{whole} has its scales in {scales[0]}: a quantised layout that config.json does not name."
            if header.dtype.itemsize == 1
            else f"{whole} is of dtype {header.dtype} and yet has scales, {scales[0]}."
        )
        tensors[whole] = tensors[whole]._replace(problems=(CheckpointError(what, MISMATCH),))
    return tensors
