"""Which checkpoint tensor fills which part of which model tensor, by transformers' own conversion mapping.

The only file that touches transformers' internals of loading: the mapping, and the rule by which it renames a key. Its converters
stack and concatenate whole tensors; here each becomes a placement, so that a tensor can be written where it belongs as it is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from m2ray.errors import CheckpointError
from m2ray.model.skeleton import ModelTensor, Skeleton

Shape = tuple[int, ...]

MISMATCH = "config.json and the weights do not belong together."


@dataclass(frozen=True)
class Placement:
    """A checkpoint tensor and the part of a model tensor that it fills: all of it, or a range of one expert's.

    `axis` counts in the expert's own tensor, without the axis of experts.
    """

    key: str
    expert: int | None = None
    axis: int = 0
    start: int = 0
    length: int = 0

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of the model tensor that this checkpoint tensor fills."""
        return tensor if self.expert is None else tensor[self.expert].narrow(self.axis, self.start, self.length)

    def shape_in(self, shape: Shape) -> Shape:
        """The shape of `part_of` a model tensor of `shape`."""
        return shape if self.expert is None else (*shape[1 : 1 + self.axis], self.length, *shape[2 + self.axis :])


@dataclass(frozen=True)
class Source:
    """A checkpoint key whose name leads to a model tensor; `pattern` is the converter's source that it matched, if any."""

    key: str
    pattern: str | None


class Conversion:
    """transformers' conversion mapping of one model, as its `from_pretrained` applies it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._model = skeleton.model
        # Not the model's own state: in a stage all other layers are cut away, and a name's prefix is judged by what the whole model has.
        beside = (name for name in self._model.state_dict() if name.startswith(skeleton.beside))
        self._known = dict.fromkeys([*skeleton.tensors, *skeleton.tied, *beside], True)
        mapping = get_model_conversion_mapping(skeleton.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}

    def sources(self, keys: Iterable[str]) -> Iterator[tuple[str, Source]]:
        """Each checkpoint key with the model tensor's name that it leads to, in the order in which transformers stacks them."""
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, self._converters, self._model.base_model_prefix, self._known)
            if name not in self._known and key in self._known:
                name, pattern = rename_source_key(key, [], [], self._model.base_model_prefix, self._known)
            yield name, Source(key, pattern)

    def published(self, tensor: ModelTensor) -> dict[str, Shape]:
        """The names and shapes that the family's published checkpoints have for this model tensor."""
        reverted = revert_weight_conversion(self._model, {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")})
        return {key: tuple(piece.shape) for key, piece in reverted.items()}

    def place(self, tensor: ModelTensor, sources: list[Source], shapes: Mapping[str, Shape]) -> list[Placement]:
        """Where each source goes in `tensor`; together they fill it, and nothing twice.

        Raises:
            CheckpointError: some are missing, too many, or of a wrong shape; or transformers would compute with them in a way
                that is no placement.
        """
        if not sources:
            published = ", ".join(_shorten(list(self.published(tensor))))
            alias = "" if published == tensor.name else f" (published as {published})"
            raise CheckpointError(f"The checkpoint has no tensor for {tensor.name}{alias}.", "Copy the files again.")
        if sources[0].pattern is None or len({source.pattern is None for source in sources}) > 1:
            placements = [_place_whole(tensor, [source.key for source in sources])]
        else:
            placements = _place_experts(tensor, sources, self._by_pattern[sources[0].pattern])
        for placement in placements:
            _check_shape(tensor, placement, shapes)
        return placements


def _place_whole(tensor: ModelTensor, keys: list[str]) -> Placement:
    if len(keys) > 1:
        raise CheckpointError(f"{len(keys)} tensors of the checkpoint claim to be {tensor.name}: {', '.join(_shorten(keys))}.")
    return Placement(keys[0])


def _place_experts(tensor: ModelTensor, sources: list[Source], converter: Any) -> list[Placement]:
    """Every expert's tensors: those of one expert side by side, in the order of the converter's patterns."""
    axis = _concatenation_axis(tensor, converter)
    share = tensor.shape[1 + axis] // len(converter.source_patterns)
    placements: list[Placement] = []
    for number, pattern in enumerate(converter.source_patterns):
        keys = [source.key for source in sources if source.pattern == pattern]
        by_expert = _number_experts(tensor, pattern, keys)
        placements += [Placement(key, expert, axis, number * share, share) for expert, key in by_expert.items()]
    return placements


def _concatenation_axis(tensor: ModelTensor, converter: Any) -> int:
    """The axis of one expert's tensor along which a converter lays several; 0 for one that only stacks experts.

    Raises:
        CheckpointError: the converter does anything else.
    """
    operations = converter.operations
    stacks = type(operations[0]) is MergeModulelist and operations[0].dim == 0 and len(converter.target_patterns) == 1
    if stacks and len(operations) == 1 and len(converter.source_patterns) == 1:
        return 0
    if stacks and len(operations) == 2 and type(operations[1]) is Concatenate and operations[1].dim > 0:
        return int(operations[1].dim) - 1
    raise CheckpointError(f"transformers makes {tensor.name} by {operations}, which m2ray does not do while it reads.")


def _check_shape(tensor: ModelTensor, placement: Placement, shapes: Mapping[str, Shape]) -> None:
    expected, found = placement.shape_in(tensor.shape), shapes[placement.key]
    if found != expected:
        into = "" if expected == tensor.shape else f" as its part of {tensor.name} {list(tensor.shape)}"
        raise CheckpointError(
            f"{placement.key} has shape {list(found)}, the model of config.json needs {list(expected)}{into}.",
            MISMATCH,
        )


def _number_experts(tensor: ModelTensor, pattern: str, keys: list[str]) -> dict[int, str]:
    """Each expert's tensor of one pattern. transformers stacks what is there, so a missing one would shift all that follow.

    Raises:
        CheckpointError: experts are missing, or more than the model has.
    """
    tail = rf"\.(\d+)\.{pattern.rpartition('*.')[2]}(?!\w)"
    by_expert: dict[int, str] = {}
    for key in keys:
        match = re.search(tail, key)
        if match is None or int(match[1]) in by_expert:
            raise CheckpointError(f"The name {key!r} does not tell which expert of {tensor.name} it is.")
        by_expert[int(match[1])] = key
    missing = sorted(set(range(tensor.shape[0])) - by_expert.keys())
    if missing:
        named = [f"expert {number}" for number in missing]
        if keys:
            number = re.search(tail, keys[0])
            assert number is not None
            named = [f"{keys[0][: number.start(1)]}{expert}{keys[0][number.end(1) :]}" for expert in missing]
        listed = ", ".join(_shorten(named))
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} tensors {pattern!r} of {tensor.name}: {listed}.", "Copy the files again."
        )
    surplus = [key for expert, key in by_expert.items() if expert >= tensor.shape[0]]
    if surplus:
        listed = ", ".join(_shorten(surplus))
        raise CheckpointError(f"{tensor.name} of shape {list(tensor.shape)} has no room for {listed}.", MISMATCH)
    return by_expert


def _shorten(names: list[str]) -> list[str]:
    return names if len(names) <= 4 else [*names[:4], f"and {len(names) - 4} more"]
