"""One piece of a checkpoint's tensors unpacked and written into a model's tensor, on a CPU or on a GPU by torch alone; and tensors given to a model."""

from collections.abc import Iterator, Mapping
from math import lcm, prod

import torch
from torch import nn

from m2ray.errors import CheckpointError
from m2ray.model.extents import RowsToLoad
from m2ray.model.quantization.nibbles import NibbleUnpack
from m2ray.model.quantization.scaling import ScaledUnpack

_CACHED_ELEMENTS = 1 << 18
"""That are unpacked at one time on a CPU: with what that takes they stay in a core's cache."""


def fill(wanted: RowsToLoad, parts: Mapping[str, torch.Tensor]) -> None:
    """Unpack parts, if they are packed, and write them into the model in its dtype."""
    unpack, into = wanted.unpack, wanted.into
    if unpack is None:
        _convert(wanted.key, next(iter(parts.values())), into)
    elif isinstance(unpack, ScaledUnpack) and into.dtype == torch.bfloat16 and into.device == parts["values"].device:
        unpack.write(parts, into)
    elif isinstance(unpack, NibbleUnpack) and unpack.on_cpu and _is_plain(into, parts) and unpack.on_cpu(parts, into):
        pass
    else:
        for some, rows in _by_rows(wanted, parts):
            _convert(wanted.key, unpack(some), rows)


def _is_plain(into: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are unpacked on a CPU into what they are unpacked as."""
    return into.dtype == torch.bfloat16 and not into.is_cuda and not parts["values"].is_cuda


def _by_rows(wanted: RowsToLoad, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[Mapping[str, torch.Tensor], torch.Tensor]]:
    """Parts of some rows at a time, and where they go: on a CPU as many as stay in a core's cache while they are unpacked."""
    into, rows_of = wanted.into, wanted.rows_of
    if not rows_of or into.dim() == 0 or next(iter(parts.values())).is_cuda:
        yield parts, into
        return
    unit = lcm(*(rows for rows in rows_of if rows))
    step = max(1, _CACHED_ELEMENTS // max(prod(into.shape[1:]) * unit, 1)) * unit
    for start in range(0, len(into), step):
        some = {
            name: part[start // rows : -(-(start + step) // rows)] if rows else part
            for (name, part), rows in zip(parts.items(), rows_of, strict=True)
        }
        yield some, into[start : start + step]


def _convert(key: str, values: torch.Tensor, into: torch.Tensor) -> None:
    """Write values into the model in its dtype. Raises CheckpointError if float16 cannot hold them."""
    converted = values.to(into.dtype)
    if into.dtype == torch.float16 and not converted.isfinite().all():
        largest = float(values.abs().max())
        raise CheckpointError(f"{key} holds {largest:g}, which float16 cannot.", 'Set compute_dtype = "bfloat16" or "float32".')
    if converted is not into:
        into.copy_(converted)


def assign(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Make `values` the parameter or persistent buffer of that dotted name."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:  # noqa: SLF001 - set_parameter has no public name
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    else:
        module.register_buffer(leaf, values)
