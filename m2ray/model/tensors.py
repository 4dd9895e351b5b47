"""The checkpoint's tensors matched with the model's: the plan that loading follows and the table that planning counts on."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from m2ray.batches import LayerSpan, Role, TensorRow, TensorTable
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.boundary import most_beside, row_width
from m2ray.model.conversion import MISMATCH, Conversion, Placement, Source
from m2ray.model.families import fp8_block, is_fp8, quantization
from m2ray.model.headers import TensorHeader
from m2ray.model.site_table import experts_of, layers_of
from m2ray.model.skeleton import ModelTensor, Skeleton, build_skeleton
from m2ray.model.towers import decoder_config

SCALE = "_scale_inv"
OTHER_SCALE = "_scale"
"""Of a weight, in layouts that m2ray does not read."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
EXTRA_LAYERS = re.compile(r"(?:^|\.)mtp[._]")
EXTRA_HEADS = re.compile(r"^(?:score|classifier|classification_head|v_head|value_head|reward_head|regression_head|medusa_heads?)\.")
"""Names of heads that judge, score or draft, behind the last layer."""

ACTIVATION_SCALES = re.compile(r"\.(?:activation|input|output|q|k|v)_scale$")
"""Scales by which engines that multiply in FP8 quantise activations and caches; weights do not need them."""

SHOWN_PROBLEMS = 20

_IGNORED = "_keys_to_ignore_on_load_unexpected"


@dataclass(frozen=True)
class MatchedTensor:
    """One model tensor and the checkpoint tensors that fill it."""

    tensor: ModelTensor
    placements: tuple[Placement, ...]


def match_by_layer(
    skeleton: Skeleton,
    headers: Mapping[str, TensorHeader],
    span: LayerSpan | None = None,
    unread: dict[str, Role] | None = None,
    *,
    with_final_norm: bool = False,
) -> Iterator[list[MatchedTensor]]:
    """Find every model tensor's checkpoint tensors, a layer at a time, so that the first can be read while the next are matched.

    Those of no layer come first.

    Args:
        span: the layers that are wanted; all without it.
        unread: is given the checkpoint keys that no model tensor is made of, and why: the "head" of tied embeddings, "unused".
        with_final_norm: whether a span that ends with the last layer has it.

    Raises:
        CheckpointError: tensors are missing (but for the head's), unknown, of a wrong shape or dtype, or without their FP8 scale; all at
            once, after all that do match.
    """
    unread = {} if unread is None else unread
    if not is_fp8(skeleton.config_on_disk) and any(header.dtype in FP8 for header in headers.values()):
        raise CheckpointError("The checkpoint holds FP8 tensors, but config.json has no quantization_config.", MISMATCH)
    conversion = Conversion(skeleton)
    wanted = {
        tensor.name: tensor
        for tensor in (skeleton.tensors.values() if span is None else skeleton.needed(span, with_final_norm=with_final_norm))
    }
    sources: dict[str, list[Source]] = {name: [] for name in wanted}
    keys, shapes = _keys_by_layer(skeleton, headers, span), {key: header.shape for key, header in headers.items()}
    tensors: dict[int | None, list[ModelTensor]] = {}
    for tensor in wanted.values():
        tensors.setdefault(tensor.layer, []).append(tensor)
    problems: list[CheckpointError] = []
    for layer in sorted(keys.keys() | tensors.keys(), key=lambda layer: -1 if layer is None else layer):
        for name, source in conversion.sources(keys.get(layer, ())):
            if name in wanted:
                sources[name].append(source)
            elif reason := _unread_reason(skeleton, name):
                unread[source.key] = reason
            elif name not in skeleton.tensors:
                problems.append(CheckpointError(f"{source.key}: a {skeleton.config.model_type} model has no such tensor."))
        if layer is None:
            _use_tied(skeleton, sources, unread)
        matched = []
        for tensor in tensors.get(layer, ()):
            if tensor.role == "head" and not sources[tensor.name]:
                continue  # never loaded, so it need not be there
            try:
                placements = conversion.place(tensor, sources[tensor.name], shapes)
                matched.append(MatchedTensor(tensor, tuple(placements)))
                problems += [problem for placement in placements for problem in _check_dtype(skeleton, headers, tensor, placement)]
            except CheckpointError as problem:
                problems.append(problem)
        if not problems:
            yield matched
    _raise_shortened(problems)


def needed_files(skeleton: Skeleton, weight_map: Mapping[str, str], span: LayerSpan, *, with_final_norm: bool = False) -> set[str]:
    """The files that hold tensors which a stage of `span` computes with.

    Args:
        weight_map: the file of each checkpoint key.
        with_final_norm: whether a span that ends with the last layer has it.
    """
    files: set[str] = set()
    outside: dict[str, str] = {}
    in_a_layer = f"{skeleton.layers_name.rpartition('.')[2]}."
    for key, file in weight_map.items():
        if file in files and in_a_layer in key:
            continue  # there may be 100,000 keys
        layer = skeleton.layer_of(key)
        if layer is None:
            outside[key] = file
        elif layer in span:
            files.add(file)
    inputs = [tensor.name for tensor in skeleton.needed(span, with_final_norm=with_final_norm) if tensor.layer is None]
    if inputs:
        found = {name: outside[source.key] for name, source in Conversion(skeleton).sources(outside)}
        heads = {embedding: head for head, embedding in skeleton.tied.items()}  # its values may be there under the head's name only
        files |= {found[name] for name in (each if each in found else heads.get(each) for each in inputs) if name in found}
    return files


def table_of(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], span: LayerSpan | None = None, *, with_final_norm: bool = False
) -> TensorTable:
    """Every tensor of a checkpoint and of its model, built at bfloat16.

    Args:
        span: the layers whose tensors have to be there, and have bytes on disk in the table; None for all.
        with_final_norm: whether a span that ends with the last layer has it.

    Raises:
        CheckpointError: as `match_by_layer`.
    """
    unread: dict[str, Role] = {}
    matched = [each for layer in match_by_layer(skeleton, headers, span, unread, with_final_norm=with_final_norm) for each in layer]
    rows = [_row(each.tensor, tuple(placement.key for placement in each.placements), disk_bytes(each, headers)) for each in matched]
    if span is not None:
        read = {each.tensor.name for each in matched}
        rows += [_row(tensor, (), 0) for tensor in skeleton.tensors.values() if tensor.name not in read]
    for key, role in unread.items():
        rows.append(TensorRow(key, role, None, headers[key].shape, None, key_bytes(key, headers), (key,)))
    return _table(skeleton, rows)


def table_without_weights(config: Any) -> TensorTable:
    """The table of a model whose checkpoint is not at hand; disk bytes are what config.json implies.

    Tensors have the names of published checkpoints; FP8 takes one byte and a float32 scale a block, what a family keeps in float32 is
    float32 on disk, and everything else has the dtype that config.json names, two bytes if none.
    """
    skeleton = build_skeleton(config, torch.bfloat16)
    conversion = Conversion(skeleton)
    rows = []
    for tensor in skeleton.tensors.values():
        pieces = conversion.published(tensor)
        rows.append(_row(tensor, tuple(pieces), sum(_published_bytes(skeleton, tensor, key, shape) for key, shape in pieces.items())))
    return _table(skeleton, rows)


def count_sources(config: Any, keys: Iterable[str]) -> Counter[str]:
    """How many of a checkpoint's keys lead to each tensor of the model, by its name. A family may have published its layout in several ways."""
    return Counter(name for name, _ in Conversion(build_skeleton(config, torch.bfloat16)).sources(keys))


def key_bytes(key: str, headers: Mapping[str, TensorHeader]) -> int:
    """Bytes of a checkpoint tensor and of its scale, if it has one."""
    scale = headers.get(key + SCALE)
    return headers[key].num_bytes + (scale.num_bytes if scale else 0)


def disk_bytes(matched: MatchedTensor, headers: Mapping[str, TensorHeader]) -> int:
    """Bytes that one model tensor has in the checkpoint, scales included."""
    return sum(_placed_bytes(placement, headers) for placement in matched.placements)


def _placed_bytes(placement: Placement, headers: Mapping[str, TensorHeader]) -> int:
    if placement.rows is None:
        return key_bytes(placement.key, headers)
    first, stop = placement.rows
    return headers[placement.key].num_bytes // headers[placement.key].shape[0] * (stop - first)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of an FP8 tensor's scales: one a block of the last two axes, the last blocks possibly cut short."""
    if block is None:
        return ()
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _keys_by_layer(skeleton: Skeleton, headers: Mapping[str, TensorHeader], span: LayerSpan | None) -> dict[int | None, list[str]]:
    """The keys to be matched: scales go with their weights; those of layers that another stage owns are left out."""
    keys: dict[int | None, list[str]] = {}
    for key in headers:
        if any(key.endswith(suffix) and key.removesuffix(suffix) in headers for suffix in (SCALE, OTHER_SCALE)):
            continue
        layer = skeleton.layer_of(key)
        if span is None or layer is None or layer in span:
            keys.setdefault(layer, []).append(key)
    return keys


def _unread_reason(skeleton: Skeleton, name: str) -> Role | None:
    """Why the model needs no tensor of this name; None if it is not known to be unneeded."""
    if name in skeleton.tied:
        return "head"
    return "unused" if name not in skeleton.tensors and _is_unused(skeleton, name) else None


def _is_unused(skeleton: Skeleton, name: str) -> bool:
    """Whether a name is known to be of no use: layers past the last (multi-token prediction), other heads, scales of activations, what is
    beside a multimodal model's decoder, and what transformers ignores.
    """
    layer = skeleton.layer_of(name)
    if (
        name.startswith(skeleton.not_text)
        or EXTRA_LAYERS.search(name)
        or EXTRA_HEADS.search(name)
        or (layer is not None and layer >= len(skeleton.layers))
    ):
        return True
    if is_fp8(skeleton.config_on_disk) and ACTIVATION_SCALES.search(name):
        return True
    # Patterns that name a layer by number stand for sizes of the model whose last layer it is; the rule above covers those.
    models = {type(skeleton.model), type(skeleton.decoder)}
    patterns = [pattern for model in models for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001 - not public
    if any(re.search(rf"{re.escape(pattern)}\.", name) for pattern in vars(skeleton.decoder).get(_IGNORED, ())):
        return True  # what a base model says of itself, it says of this configuration
    ignored = (pattern for pattern in patterns if not re.search(r"layers\\?\.\d", pattern))
    return any(re.search(pattern, name) for pattern in (*ignored, r"rotary_emb\.inv_freq$"))


def _use_tied(skeleton: Skeleton, sources: dict[str, list[Source]], unread: dict[str, Role]) -> None:
    """Tied embeddings may be on disk under the head's name only."""
    for head, embedding in skeleton.tied.items():
        if head in unread and sources.get(embedding) == []:
            sources[embedding].append(Source(head, None))
            del unread[head]


def _check_dtype(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], tensor: ModelTensor, placement: Placement
) -> Iterator[CheckpointError]:
    key = placement.key
    weight, scale = headers[key], headers.get(key + SCALE)
    if key + OTHER_SCALE in headers:
        yield CheckpointError(
            f"{key} has its scales in {key}{OTHER_SCALE}: a quantised layout that m2ray does not read.",
            f"Take the same model in BF16, or in block-wise FP8 with scales {SCALE!r}.",
        )
        return
    if not tensor.dtype.is_floating_point:  # a table of numbers, which nothing may round
        if weight.dtype != tensor.dtype and (weight.dtype, tensor.dtype) != (torch.int32, torch.int64):
            yield CheckpointError(f"{key} is of dtype {weight.dtype}, the model needs {tensor.dtype}.", MISMATCH)
        return
    if weight.dtype not in FP8:
        if weight.dtype not in WEIGHTS:
            yield CheckpointError(
                f"{key} is of dtype {weight.dtype}, which is no weight.", "m2ray reads BF16, F16, F32 and block-wise FP8."
            )
        if scale is not None:
            yield CheckpointError(f"{key} is of dtype {weight.dtype} and yet has FP8 scales, {key}{SCALE}.", MISMATCH)
        return
    if placement.rows is not None or placement.swapped is not None:
        yield CheckpointError(
            f"{key} is FP8, and transformers splits or transposes it to make {tensor.name}.", "m2ray does so with other dtypes only."
        )
    if scale is None:
        yield CheckpointError(f"{key} is FP8, but its scales {key}{SCALE} are missing.", MISMATCH)
        return
    block = fp8_block(skeleton.config_on_disk)
    expected = scale_shape(weight.shape, block)
    if scale.dtype not in SCALES or (scale.shape != expected and not (block is None and prod(scale.shape) == 1)):
        yield CheckpointError(
            f"{key}{SCALE} is {scale.dtype} {list(scale.shape)}; {key} {list(weight.shape)} in blocks of {block} needs {list(expected)}."
        )


def _raise_shortened(problems: list[CheckpointError]) -> None:
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(CheckpointError(f"... and {len(problems) - len(shown)} more like these."))
    raise_all(shown)


def _table(skeleton: Skeleton, rows: Iterable[TensorRow]) -> TensorTable:
    beside, experts = most_beside(skeleton.config), experts_of(skeleton)
    return TensorTable(len(skeleton.layers), row_width(skeleton.config), tuple(rows), *beside, *experts, layers_of(skeleton))


def _row(tensor: ModelTensor, keys: tuple[str, ...], num_bytes: int) -> TensorRow:
    itemsize_bytes = None if tensor.dtype == torch.bfloat16 else tensor.dtype.itemsize
    return TensorRow(tensor.name, tensor.role, tensor.layer, tensor.shape, itemsize_bytes, num_bytes, keys)


def _published_bytes(skeleton: Skeleton, tensor: ModelTensor, key: str, shape: tuple[int, ...]) -> int:
    if tensor.dtype != torch.bfloat16:
        return prod(shape) * tensor.dtype.itemsize
    if is_fp8(skeleton.config_on_disk) and _is_quantised(skeleton, tensor, key):
        return prod(shape) + prod(scale_shape(shape, fp8_block(skeleton.config_on_disk))) * 4
    dtype = skeleton.config_on_disk.dtype or decoder_config(skeleton.config_on_disk).dtype
    return prod(shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 2)


def _is_quantised(skeleton: Skeleton, tensor: ModelTensor, key: str) -> bool:
    """What transformers quantises: a layer's linear weights and its experts, unless config.json names the module."""
    skipped = quantization(skeleton.config_on_disk).get("modules_to_not_convert") or ()
    if tensor.role != "layer" or any(f".{module}." in f".{key}." for module in skipped):
        return False
    module, _, name = tensor.name.rpartition(".")
    return (name == "weight" and isinstance(skeleton.model.get_submodule(module), nn.Linear)) or len(tensor.shape) == 3
