"""The table of all tensors of a checkpoint and of its model, which planning counts on: from the files, or from config.json alone."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.boundary import most_beside, residual_dtype, row_width
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.conversion import Conversion
from m2ray.model.float8.weights import is_packed, require_any, require_float8, require_published
from m2ray.model.headers import TensorHeader
from m2ray.model.interpreter import without_collector
from m2ray.model.quantization.layout import Layout
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.quantization.stored import Method, StoredTensor
from m2ray.model.site_table import experts_of, layers_of
from m2ray.model.skeleton import ModelTensor, Skeleton, build_skeleton
from m2ray.model.tensors import FP8, disk_bytes, match_by_layer, needed_files
from m2ray.model.towers import decoder_config
from m2ray.tensor_rows import Role, TensorRow, TensorTable

_KEPT_TABLES = 2
"""Each holds its headers too: tens of MB of a large model."""


@without_collector()
def tensor_table(checkpoint: Checkpoint, *, in_float8: bool = False) -> TensorTable:
    """Every tensor of the model and of the checkpoint, matched.

    Args:
        in_float8: whether FP8 weights stay as they are (m2ray.model.float8).

    Raises:
        CheckpointError: files are damaged, or tensors missing, unknown, of a wrong shape or dtype; all at once.
        ConfigError, StoreError: as `build_skeleton` and `Checkpoint.check`; weights that cannot stay FP8.
    """
    checkpoint.check()
    return _of_files(checkpoint, build_skeleton(checkpoint.whole_config, torch.bfloat16), None, in_float8=in_float8)


@without_collector()
def up_to_layer(
    checkpoint: Checkpoint, last: int, *, with_final_norm: bool = False, in_float8: bool = False
) -> tuple[Checkpoint, TensorTable]:
    """The checkpoint of a run that ends with layer `last`, with the files that it needs and no others, and the table of its tensors.

    With the final norm, a run that ends with the model's last layer needs its file too.

    Where files that it does not need are absent or damaged, or layers follow, the table has no bytes on disk of what is not run.

    Raises:
        CheckpointError, ConfigError, StoreError: as `tensor_table`, but for files and tensors that are not needed.
    """
    files, table = _up_to_layer(_Opened(checkpoint.digest, frozenset(checkpoint.damaged), checkpoint), last, with_final_norm, in_float8)
    return checkpoint.only(files), table


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that counts as the same where its fingerprint is, and the files that are not in it."""

    digest: str
    damaged: frozenset[str]
    checkpoint: Checkpoint = field(compare=False)


@lru_cache(_KEPT_TABLES)
def _up_to_layer(opened: _Opened, last: int, with_final_norm: bool, in_float8: bool) -> tuple[frozenset[str], TensorTable]:  # noqa: FBT001 - as lru_cache counts them
    """The files and the table of `up_to_layer`. A program that runs one job after another asks for the same, and matching all tensors takes long."""
    checkpoint = opened.checkpoint
    skeleton = build_skeleton(checkpoint.whole_config, torch.bfloat16)
    span = LayerSpan(0, last + 1)
    files = frozenset(needed_files(skeleton, checkpoint.weight_map, span, with_final_norm=with_final_norm))
    needed = checkpoint.only(files)
    raise_all([*needed.damaged.values(), *checkpoint.twice])
    is_whole = len(span) == len(skeleton.layers) and not checkpoint.damaged
    if is_whole:
        return files, _of_files(checkpoint, skeleton, None, in_float8=in_float8)
    return files, _of_files(needed, skeleton, span, with_final_norm=with_final_norm, in_float8=in_float8)


def is_of_run(checkpoint: Checkpoint, layers_run: int, fingerprint: str) -> bool:
    """Whether a run of so many layers that has this fingerprint of its model takes this checkpoint, with or without the final norm."""
    return any(up_to_layer(checkpoint, layers_run - 1, with_final_norm=each)[0].digest == fingerprint for each in (False, True))


def _of_files(
    checkpoint: Checkpoint, skeleton: Skeleton, span: LayerSpan | None, *, with_final_norm: bool = False, in_float8: bool
) -> TensorTable:
    try:
        return table_of(skeleton, checkpoint.headers, span, with_final_norm=with_final_norm, in_float8=in_float8)
    except CheckpointError as problem:
        raise_all([*checkpoint.stale, problem])
        raise


def table_of(
    skeleton: Skeleton,
    headers: Mapping[str, TensorHeader],
    span: LayerSpan | None = None,
    *,
    with_final_norm: bool = False,
    in_float8: bool = False,
) -> TensorTable:
    """Every tensor of a checkpoint and of its model, built at bfloat16.

    Args:
        span: the layers whose tensors have to be there, and have bytes on disk in the table; None for all.
        with_final_norm: whether a span that ends with the last layer has it.
        in_float8: whether FP8 weights stay as they are (m2ray.model.float8).

    Raises:
        CheckpointError: as `match_by_layer`.
        ConfigError: with `in_float8`, weights that cannot stay FP8, or none that could.
    """
    unread: dict[str, tuple[Role, StoredTensor]] = {}
    matched = [each for layer in match_by_layer(skeleton, headers, span, unread, with_final_norm=with_final_norm) for each in layer]
    if in_float8:
        require_any(is_any=any(map(is_packed, matched)))
        require_float8(skeleton.model, matched)
    rows = [
        _row(
            each.tensor,
            tuple(stored.key for stored in each.stored),
            disk_bytes(each),
            each.stored[0].method if each.stored else "",
            FP8[0] if in_float8 and is_packed(each) else each.lies_as,
        )
        for each in matched
    ]
    if span is not None:
        read = {each.tensor.name for each in matched}
        rows += [_row(tensor, (), 0) for tensor in skeleton.tensors.values() if tensor.name not in read]
    for role, stored in unread.values():
        rows.append(TensorRow(stored.key, role, None, stored.shape, None, stored.num_bytes, (stored.key,), stored.method))
    return _table(skeleton, rows)


def table_without_weights(config: Any, *, in_float8: bool = False) -> TensorTable:
    """The table of a model whose checkpoint is not at hand; disk bytes are what config.json implies.

    Tensors have the names of published checkpoints; what the configuration quantises has its layout's bytes, what a family keeps in float32
    is float32 on disk, and everything else has the dtype that config.json names, two bytes if none.

    Raises:
        ConfigError: with `in_float8`, weights that cannot stay FP8, as far as config.json tells.
    """
    skeleton = build_skeleton(config, torch.bfloat16)
    conversion, layout = Conversion(skeleton), layout_of(config)
    rows = []
    packed: list[tuple[ModelTensor, Method]] = []
    for tensor in skeleton.tensors.values():
        pieces = conversion.published(tensor)
        methods = {key: _method_of(layout, skeleton, tensor, key) for key in pieces}
        num_bytes = sum(_published_bytes(skeleton, tensor, methods[key], shape) for key, shape in pieces.items())
        method = next((method for method in methods.values() if method), None)
        packed += [(tensor, method)] if method else []
        lies_as = _published_dtype(skeleton, tensor) if not method else FP8[0] if in_float8 else None
        rows.append(_row(tensor, tuple(pieces), num_bytes, method.name if method else "", lies_as))
    if in_float8:
        require_any(is_any=bool(packed))
        require_published(skeleton.model, packed)
    return _table(skeleton, rows)


def count_sources(config: Any, keys: Iterable[str]) -> Counter[str]:
    """How many of a checkpoint's keys lead to each tensor of the model, by its name. A family may have published its layout in several ways."""
    groups = layout_of(config).group(keys)
    return Counter(name for name, _ in Conversion(build_skeleton(config, torch.bfloat16)).sources(groups))


def _table(skeleton: Skeleton, rows: Iterable[TensorRow]) -> TensorTable:
    config = skeleton.config
    beside, experts, dtype = most_beside(config), experts_of(skeleton), residual_dtype(config)
    itemsize_bytes = dtype.itemsize if dtype else None
    return TensorTable(len(skeleton.layers), row_width(config), tuple(rows), *beside, *experts, layers_of(skeleton), itemsize_bytes)


def _row(tensor: ModelTensor, keys: tuple[str, ...], num_bytes: int, method: str = "", lies_as: torch.dtype | None = None) -> TensorRow:
    itemsize_bytes = None if tensor.dtype == torch.bfloat16 else tensor.dtype.itemsize
    dtype = str(lies_as).removeprefix("torch.") if lies_as else ""
    return TensorRow(tensor.name, tensor.role, tensor.layer, tensor.shape, itemsize_bytes, num_bytes, keys, method, dtype)


def _published_bytes(skeleton: Skeleton, tensor: ModelTensor, method: Method | None, shape: tuple[int, ...]) -> int:
    if method is not None and tensor.dtype == torch.bfloat16:
        return method.published_bytes(shape)
    return prod(shape) * _published_dtype(skeleton, tensor).itemsize


def _published_dtype(skeleton: Skeleton, tensor: ModelTensor) -> torch.dtype:
    """Of a tensor that is not quantised."""
    if tensor.dtype != torch.bfloat16:
        return tensor.dtype
    dtype = skeleton.config_on_disk.dtype or decoder_config(skeleton.config_on_disk).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _method_of(layout: Layout, skeleton: Skeleton, tensor: ModelTensor, key: str) -> Method | None:
    """How a published tensor is packed: a layer's linear weights and its experts are, unless the configuration leaves them out by its name
    or the model's own.
    """
    module, _, name = tensor.name.rpartition(".")
    is_linear = name == "weight" and isinstance(skeleton.model.get_submodule(module), nn.Linear)
    if not layout.methods or tensor.role != "layer" or tensor.dtype != torch.bfloat16 or not (is_linear or len(tensor.shape) == 3):
        return None
    names = (key.removesuffix(".weight"), tensor.name.removesuffix(".weight"))
    if any(layout.is_left_out(each) for each in names):
        return None
    return next((method for each in names if (method := layout.method_of(each))), None)
