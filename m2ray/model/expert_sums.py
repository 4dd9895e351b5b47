"""Experts' rows of each token, weighted and added up on a GPU: by themselves, or onto the stream that leaves a compiled layer."""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from m2ray.model.graph_values import SHAPED, written_parts

_ATEN = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default

MOST_COLUMNS = 1024
"""Values of a row that a program takes at a time."""


@torch.library.custom_op("m2ray::sum_rows", mutates_args=())
def sum_rows(rows_RH: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each token's rows, float32 [N, H], from its first place to its last.

    It is rounded together with what it is added to, as where torch.compile fuses both.
    """
    if not rows_RH.is_cuda or not len(places_NK):
        return summed(rows_RH, places_NK, weights_NK)
    sums_NH = rows_RH.new_empty((len(places_NK), rows_RH.shape[1]), dtype=torch.float32)
    _launch([], rows_RH, places_NK, weights_NK, sums_NH)
    return sums_NH


@sum_rows.register_fake
def _(rows_RH: torch.Tensor, places_NK: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    # Not `len`: it makes a number of a size that is open, and each shape would be compiled again.
    return rows_RH.new_empty((places_NK.shape[0], rows_RH.shape[1]), dtype=torch.float32)


@torch.library.custom_op("m2ray::add_rows", mutates_args=())
def add_rows(
    stream_NH: torch.Tensor, beside_NH: torch.Tensor | None, rows_RH: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """That sum, and what it is added to, of one part or two, in its dtype: rounded once."""
    parts = [part.contiguous() for part in (stream_NH, beside_NH) if part is not None]
    if not rows_RH.is_cuda or not len(places_NK):
        return (sum(part.float() for part in parts) + summed(rows_RH, places_NK, weights_NK)).to(stream_NH.dtype)
    sums_NH = torch.empty_like(parts[0])
    _launch(parts, rows_RH, places_NK, weights_NK, sums_NH)
    return sums_NH


@add_rows.register_fake
def _(stream_NH: torch.Tensor, _: torch.Tensor | None, __: torch.Tensor, ___: torch.Tensor, ____: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(stream_NH, memory_format=torch.contiguous_format)


def _launch(
    parts_NH: list[torch.Tensor], rows_RH: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor, sums_NH: torch.Tensor
) -> None:
    width, columns = rows_RH.shape[1], min(MOST_COLUMNS, 1 << (rows_RH.shape[1] - 1).bit_length())
    given = (*[*parts_NH, None, None][:2], rows_RH.contiguous(), places_NK.contiguous(), weights_NK.contiguous())
    _kernels().sum_rows[len(places_NK),](*given, sums_NH, width, places_NK.shape[1], columns, enable_fp_fusion=False)


def summed(rows_RH: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """The same as `sum_rows` by torch."""
    total_NH = rows_RH.new_zeros((len(places_NK), rows_RH.shape[1]), dtype=torch.float32)
    for place_N, weight_N in zip(places_NK.unbind(1), weights_NK.float().unbind(1), strict=True):
        total_NH += rows_RH[place_N].float() * weight_N[:, None]
    return total_NH


def replace_sum(graph: Graph) -> None:
    """Put `add_rows` in the place of a sum and of its addition to the stream, where nothing but that leaves the layer, and the stream is in memory
    or a sum of two that are: torch.compile adds what it computes unrounded, and so does this.
    """
    for sums in graph.find_nodes(op="call_function", target=torch.ops.m2ray.sum_rows.default):
        *steps, added = _steps(sums)
        if not _is_last(added, steps[-1]):
            continue
        (stream,) = (each for each in added.args if each is not steps[-1])
        parts = written_parts(stream)
        if not parts:
            continue
        shape = [steps[-1].args[1]] if steps[-1].target in SHAPED else []
        with graph.inserting_before(added):
            flat = [graph.call_function(_ATEN.reshape.default, (part, [-1, sums.meta["val"].shape[1]])) for part in parts]
            result = graph.call_function(torch.ops.m2ray.add_rows.default, (*[*flat, None][:2], *sums.args))
            for each in shape:
                result = graph.call_function(_ATEN.reshape.default, (result, each))
        added.replace_all_uses_with(result)
        for node in (added, *reversed(steps)):
            graph.erase_node(node)


def _steps(sums: Node) -> list[Node]:
    """A sum, its rounding and reshaping, as long as each has one user, and what uses the last of them; the graph's output where several do."""
    steps: list[Any] = [sums]
    while len(steps[-1].users) == 1 and (steps[-1] is sums or steps[-1].target == _CONVERT or steps[-1].target in SHAPED):
        steps += steps[-1].users
    return steps if len(steps) > 1 else [*steps, sums.graph.output_node()]


def _is_last(added: Node, rounded: Node) -> bool:
    """Whether it adds what was rounded to a stream as wide, in bfloat16, and is the graph's output and nothing else."""
    given: Any = added.args
    return (
        added.target == _ATEN.add.Tensor
        and not added.kwargs
        and given.count(rounded) == 1
        and all(isinstance(each, Node) and each.meta["val"].dtype == torch.bfloat16 for each in given)
        and given[0].meta["val"].shape == given[1].meta["val"].shape
        and all(user.op == "output" for user in added.users)
    )


@cache
def _kernels() -> Any:
    from m2ray.model import experts_kernel

    return experts_kernel
