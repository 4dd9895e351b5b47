"""Which weights of a checkpoint stay FP8 in memory: those in blocks of 128 x 128, of linear layers and of stacked experts; and what is refused."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import nn

from m2ray.errors import ConfigError
from m2ray.model.conversion import Placement
from m2ray.model.float8 import REMEDY
from m2ray.model.float8.modules import SCALES
from m2ray.model.float8.rounding import BLOCK, FP8
from m2ray.model.quantization.scaled import FLOAT_SCALES, Scaled, scale_shape
from m2ray.model.quantization.scaling import ScaledUnpack
from m2ray.model.quantization.stored import Method, StoredTensor
from m2ray.model.skeleton import ModelTensor
from m2ray.model.tensors import MatchedTensor

BLOCKS = (BLOCK, BLOCK)

_UP = ("gate_up_proj", "up_proj")
_SHOWN = 3


def is_packed(matched: MatchedTensor) -> bool:
    """Whether it is a layer's, and any of what it is made of would have to be unpacked."""
    return matched.tensor.role == "layer" and any(stored.unpack is not None for stored in matched.stored)


def in_parts(matched: MatchedTensor) -> "tuple[MatchedTensor, MatchedTensor]":
    """A weight of which all is FP8 in blocks, as two tensors: FP8 values as they lie in the files, and scales in float32."""
    tensor = matched.tensor
    scales = ModelTensor(tensor.name + SCALES, tensor.role, tensor.layer, scale_shape(tensor.shape, BLOCKS), torch.float32)
    return (
        replace(matched, tensor=replace(tensor, dtype=FP8), stored=tuple(_part(stored, 0) for stored in matched.stored)),
        replace(
            matched,
            tensor=scales,
            placements=tuple(map(of_scales, matched.placements)),
            stored=tuple(_part(stored, 1) for stored in matched.stored),
        ),
    )


def of_scales(placement: Placement) -> Placement:
    """Where the scales go of a tensor that is placed so."""
    if placement.length is None or placement.axis:
        return placement
    return replace(placement, start=placement.start // BLOCK, length=-(-placement.length // BLOCK))


def require_float8(model: nn.Module, layers: Iterable[MatchedTensor]) -> None:
    """Raise ConfigError unless all of these that is packed can stay FP8."""
    _require_all(model, [(matched.tensor, _why_not(matched)) for matched in layers if is_packed(matched)])


def require_published(model: nn.Module, packed: Iterable[tuple[ModelTensor, Method]]) -> None:
    """The same of a model whose files are not at hand, by what config.json says of how its tensors are packed."""
    _require_all(model, [(tensor, _why_not_published(tensor, method)) for tensor, method in packed])


def require_any(*, is_any: bool) -> None:
    """Raise ConfigError where nothing of what is run is packed."""
    if not is_any:
        raise _refused(["none of its weights that are run are FP8 in blocks of 128 x 128"])


def _why_not(matched: MatchedTensor) -> str:
    """Why a packed tensor cannot be used as the files have it; "" if it can."""
    for placement, stored in zip(matched.placements, matched.stored, strict=True):
        if reason := _why_not_stored(stored) or _why_not_placed(placement):
            return reason
    return ""


def _why_not_stored(stored: StoredTensor) -> str:
    unpack, sides = stored.unpack, stored.shape[-2:]
    if not isinstance(unpack, ScaledUnpack) or unpack.block is None or len(sides) < 2:
        return f"{stored.key} is {stored.method or 'not quantised'}, not FP8 in blocks of 128 x 128"
    if unpack.block != (min(BLOCK, sides[0]), BLOCK) or sides[1] % BLOCK:
        return f"{stored.key} {list(stored.shape)} is {stored.method} in blocks of {unpack.block[0]} x {unpack.block[1]}, not of 128 x 128 that are whole"
    values, scale = stored.parts[0].header.dtype, stored.parts[1].header.dtype
    if values != FP8 or scale not in FLOAT_SCALES:
        return f"{stored.key} is {values} with scales of {scale}, not float8_e4m3fn with floats"
    return ""


def _why_not_placed(placement: Placement) -> str:
    along = placement.length is not None and (placement.axis > 0 or placement.start % BLOCK > 0 or (placement.length % BLOCK > 0))
    if placement.swapped is not None or placement.rows is not None or along:
        return f"{placement.key} is cut or put together at places that are no multiples of 128"
    return ""


def _why_not_published(tensor: ModelTensor, method: Method) -> str:
    if not isinstance(method, Scaled) or method.blocks != (BLOCKS,) or method.dtypes[0] != FP8:
        return f"{tensor.name} is {method.name}, not FP8 in blocks of 128 x 128"
    return "" if tensor.shape[-1] % BLOCK == 0 else f"{tensor.name} {list(tensor.shape)} has columns that are no multiple of 128"


def _require_all(model: nn.Module, found: Sequence[tuple[ModelTensor, str]]) -> None:
    reasons = [reason for _, reason in found if reason] or list(_not_multiplied(model, [tensor.name for tensor, _ in found]))
    if reasons:
        raise _refused(reasons)


def _not_multiplied(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Weights that belong to no module whose products m2ray makes in FP8."""
    split = sorted(name.rpartition(".")[::2] for name in names)
    for owner, group in groupby(split, key=lambda each: each[0]):
        module, leaves = model.get_submodule(owner), [leaf for _, leaf in group]
        if not (type(module) is nn.Linear and leaves == ["weight"]) and not _are_experts(module, leaves):
            yield f"{owner} is a {type(module).__name__} with {' and '.join(leaves)} in FP8, whose products m2ray makes in bfloat16 only"


def _are_experts(module: nn.Module, leaves: Sequence[str]) -> bool:
    """Whether that is how transformers stacks experts, all of whose weights are these. Biases, turned weights and norms behind them are not done."""
    has_gate = getattr(module, "has_gate", None)
    if has_gate is None or any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm")):
        return False
    return set(leaves) == {_UP[0] if has_gate else _UP[1], "down_proj"} == set(module._parameters)  # noqa: SLF001 - has no public name


def _refused(reasons: Sequence[str]) -> ConfigError:
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return ConfigError(f"compute_dtype = 'float8' for this checkpoint: {'; '.join(reasons[:_SHOWN])}{more}.", REMEDY)


def _part(stored: StoredTensor, number: int) -> StoredTensor:
    """One of its parts as a tensor that is not packed."""
    part = stored.parts[number]
    return StoredTensor(part.key, part.header.shape, (part._replace(name="values", rows=1),))
