"""Which checkpoint tensor fills which part of which model tensor, by transformers' own conversion mapping.

The only file that touches transformers' internals of loading: the mapping, and the rule by which it renames a key. Its converters
stack, concatenate, split and transpose whole tensors; here each becomes placements, so that a tensor can be written where it belongs
as it is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from m2ray.errors import CheckpointError
from m2ray.model.quantization.stored import MISMATCH
from m2ray.model.skeleton import ModelTensor, Skeleton

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """A checkpoint tensor and the part of a model tensor that it fills: all of it, one expert's, and of either all or a range along an axis.

    Attributes:
        axis: of the range, without the axis of experts.
        length: of the range; None for all.
        rows: first row, and the one after the last, of the checkpoint tensor that are placed; None for all.
        swapped: two axes of the part that are swapped on disk.
    """

    key: str
    expert: int | None = None
    axis: int = 0
    start: int = 0
    length: int | None = None
    rows: tuple[int, int] | None = None
    swapped: tuple[int, int] | None = None

    @property
    def is_one_piece(self) -> bool:
        """Whether its rows lie in the model tensor without a gap, as they do in the file."""
        return self.swapped is None and (self.length is None or self.axis == 0)

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of the model tensor that these rows of the checkpoint tensor fill."""
        part = tensor if self.expert is None else tensor[self.expert]
        part = part if self.length is None else part.narrow(self.axis, self.start, self.length)
        return part if self.swapped is None else part.transpose(*self.swapped)

    def shape_in(self, shape: Shape) -> Shape:
        """The shape of `part_of` a model tensor of `shape`."""
        sides = list(shape if self.expert is None else shape[1:])
        if self.length is not None:
            sides[self.axis] = self.length
        if self.swapped is not None:
            one, other = self.swapped
            sides[one], sides[other] = sides[other], sides[one]
        return tuple(sides)


@dataclass(frozen=True)
class Source:
    """A checkpoint key whose name leads to a model tensor.

    Attributes:
        pattern: the converter's source that it matched, if any.
        targets: names of all model tensors that the key is split among, in order; empty for a key that goes into one.
    """

    key: str
    pattern: str | None
    targets: tuple[str, ...] = ()


class Conversion:
    """transformers' conversion mapping of one model, as its `from_pretrained` applies it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._model = skeleton.model
        # Not the model's own state: in a stage all other layers are cut away, and a name's prefix is judged by what the whole model has.
        not_text = (name for name in self._model.state_dict() if name.startswith(skeleton.not_text))
        self._known = dict.fromkeys([*skeleton.tensors, *skeleton.tied, *not_text], True)
        self._shapes = {name: tensor.shape for name, tensor in skeleton.tensors.items()}
        mapping = get_model_conversion_mapping(skeleton.model)
        # What transformers reverts a name by. It would walk through the whole model to find it, for each name again.
        published = get_model_conversion_mapping(skeleton.model, add_legacy=False)
        skeleton.model._weight_conversions = [entry for entry in published if not isinstance(entry, PrefixChange)]  # noqa: SLF001 - not public
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}

    def sources(self, keys: Iterable[str]) -> Iterator[tuple[str, Source]]:
        """Each checkpoint key with the model tensor's name that it leads to, in the order in which transformers stacks them."""
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, self._converters, self._model.base_model_prefix, self._known)
            if name not in self._known and key in self._known:
                name, pattern = rename_source_key(key, [], [], self._model.base_model_prefix, self._known)
            targets: list[str] = [] if pattern is None else self._by_pattern[pattern].target_patterns
            if len(targets) <= 1:
                yield name, Source(key, pattern)
                continue
            names = tuple(name.replace(targets[0], target) for target in targets)
            for each in names:
                yield each, Source(key, pattern, names)

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
            raise CheckpointError(f"The checkpoint has no tensor for {tensor.name}{alias}.", MISMATCH)
        if sources[0].pattern is None or len({source.pattern is None for source in sources}) > 1:
            placements = [_place_whole(tensor, [source.key for source in sources])]
        else:
            placements = self._convert(tensor, sources, self._by_pattern[sources[0].pattern], shapes)
        for placement in placements:
            _check_shape(tensor, placement, shapes)
        return placements

    def _convert(self, tensor: ModelTensor, sources: list[Source], converter: Any, shapes: Mapping[str, Shape]) -> list[Placement]:
        """What a converter does with whole tensors, as placements.

        Raises:
            CheckpointError: they would not fill the model tensor, or the converter does anything else.
        """
        operations = converter.operations
        kinds = [type(operation) for operation in operations]
        is_one_target = len(converter.target_patterns) == 1
        if kinds[0] is MergeModulelist and operations[0].dim == 0 and is_one_target:
            if kinds[1:] == [Concatenate] and operations[1].dim > 0:
                return _place_experts(tensor, sources, converter.source_patterns, int(operations[1].dim) - 1)
            if not kinds[1:] and len(converter.source_patterns) == 1:
                return _place_experts(tensor, sources, converter.source_patterns, 0)
        elif kinds == [Concatenate] and is_one_target:
            return _place_side_by_side(tensor, sources, converter.source_patterns, operations[0].dim, shapes)
        elif kinds in ([Split], [Chunk]) and operations[0].dim == 0 and sources[0].targets:
            sizes = [self._shapes[name][0] for name in sources[0].targets if name in self._shapes]
            if len(sizes) == len(sources[0].targets) and (kinds == [Split] or len(set(sizes)) == 1):
                return [_place_rows(tensor, sources, sizes, shapes)]
        elif kinds == [Transpose] and is_one_target:
            whole, axes = _place_whole(tensor, [source.key for source in sources]), (operations[0].dim0, operations[0].dim1)
            is_as_on_disk = operations[0].check_dims and shapes[whole.key] == tensor.shape
            return [whole if is_as_on_disk else Placement(whole.key, swapped=axes)]
        raise CheckpointError(f"transformers makes {tensor.name} by {operations}, which m2ray does not do while it reads.")


def _place_whole(tensor: ModelTensor, keys: list[str]) -> Placement:
    if len(keys) > 1:
        raise CheckpointError(f"{len(keys)} tensors of the checkpoint claim to be {tensor.name}: {', '.join(_shorten(keys))}.")
    return Placement(keys[0])


def _place_experts(tensor: ModelTensor, sources: list[Source], patterns: Sequence[str], axis: int) -> list[Placement]:
    """Every expert's tensors: those of one expert side by side along an axis of its own tensor, in the order of the converter's patterns."""
    share = tensor.shape[1 + axis] // len(patterns)
    placements: list[Placement] = []
    for number, pattern in enumerate(patterns):
        keys = [source.key for source in sources if source.pattern == pattern]
        by_expert = _number_experts(tensor, pattern, keys)
        placements += [Placement(key, expert, axis, number * share, share) for expert, key in by_expert.items()]
    return placements


def _place_side_by_side(
    tensor: ModelTensor, sources: list[Source], patterns: Sequence[str], axis: int, shapes: Mapping[str, Shape]
) -> list[Placement]:
    """Tensors one after the other along an axis, in the order of the converter's patterns and, within one, of their numbers."""
    ordered = [source.key for pattern in patterns for source in sources if source.pattern == pattern]
    if absent := [pattern for pattern in patterns if not any(source.pattern == pattern for source in sources)]:
        raise CheckpointError(f"The checkpoint lacks {', '.join(map(repr, absent))} of {tensor.name}.", "Copy the files again.")
    placements, start = [], 0
    for key in ordered:
        if len(shapes[key]) != len(tensor.shape):
            raise CheckpointError(f"{key} has shape {list(shapes[key])}, to be a part of {tensor.name} {list(tensor.shape)}.", MISMATCH)
        length = shapes[key][axis]
        placements.append(Placement(key, None, axis, start, min(length, tensor.shape[axis] - start)))
        start += length
    if start != tensor.shape[axis]:
        raise CheckpointError(
            f"{', '.join(_shorten(ordered))} have {start} rows together along axis {axis}, "
            f"the model of config.json needs {tensor.shape[axis]} as {tensor.name}.",
            MISMATCH,
        )
    return placements


def _place_rows(tensor: ModelTensor, sources: list[Source], sizes: Sequence[int], shapes: Mapping[str, Shape]) -> Placement:
    """The rows of one checkpoint tensor that are this model tensor; `sizes` are those of all that it is split among."""
    key, targets = _place_whole(tensor, [source.key for source in sources]).key, sources[0].targets
    first = sum(sizes[: targets.index(tensor.name)])
    if shapes[key][:1] != (sum(sizes),):
        raise CheckpointError(
            f"{key} has shape {list(shapes[key])}, the model of config.json needs {sum(sizes)} rows for {', '.join(targets)}.", MISMATCH
        )
    return Placement(key, rows=(first, first + tensor.shape[0]))


def _check_shape(tensor: ModelTensor, placement: Placement, shapes: Mapping[str, Shape]) -> None:
    expected, found = placement.shape_in(tensor.shape), shapes[placement.key]
    if placement.rows is not None:
        found = (placement.rows[1] - placement.rows[0], *found[1:])
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
        raise CheckpointError(f"The checkpoint lacks {len(missing)} tensors {pattern!r} of {tensor.name}: {listed}.", MISMATCH)
    surplus = [key for expert, key in by_expert.items() if expert >= tensor.shape[0]]
    if surplus:
        listed = ", ".join(_shorten(surplus))
        raise CheckpointError(f"{tensor.name} of shape {list(tensor.shape)} has no room for {listed}.", MISMATCH)
    return by_expert


def _shorten(names: list[str]) -> list[str]:
    return names if len(names) <= 4 else [*names[:4], f"and {len(names) - 4} more"]
