"""A norm whose result is rounded to FP8, in compiled layers on a GPU: by one kernel, which reads the stream once and writes what is multiplied."""

from functools import cache
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from m2ray.model.float8 import rounding
from m2ray.model.float8.rounding import BLOCK, FP8, is_near, rounded
from m2ray.model.graph_values import norm_of, takers, unshaped, written_parts
from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_MOST_VALUES, _WARP_VALUES = 16384, 2048
"""Of a row, which a program of the kernel holds at once, and of these that a warp does."""


def replace_norm(graph: Graph) -> None:
    """Put `normed_float8` in the place of the stream's norm and its rounding, where nothing else is given what is normed but, in float32, a router."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.m2ray.round_float8.default):
        normed = unshaped(node.args[0])
        norm, others = norm_of(normed), [taker for taker in takers(normed) if taker is not node]
        sizes = [taker for taker in others if taker.target == _ATEN.sym_size.int]
        wide = [taker for taker in others if taker.target == _CONVERT and taker.args[1] == torch.float32]
        if norm is None or len(sizes) + len(wide) < len(others) or any(_shape(each.args[0]) != _shape(node.args[0]) for each in others):
            continue
        width, parts = norm.weight.meta["val"].shape[0], written_parts(norm.given)
        if not parts or not _fits(width, node):
            continue
        with graph.inserting_before(normed.next):
            rows = [graph.call_function(_ATEN.reshape.default, (part, [-1, width])) for part in parts]
            given = *[*rows, None][:2], norm.weight, norm.epsilon
            result = graph.call_function(torch.ops.m2ray.normed_float8.default, given, {"is_wide": bool(wide)})
            for each in wide:
                each.replace_all_uses_with(graph.call_function(getitem, (result, 2)))
            for each in sizes:
                each.update_arg(0, graph.call_function(getitem, (result, 0)))
        node.replace_all_uses_with(result)
        for each in (node, *wide):
            graph.erase_node(each)
    graph.eliminate_dead_code()


def _shape(node: Any) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def _fits(width: Any, node: Node) -> bool:
    return bool(_shape(node.args[0])[1] == width and width % BLOCK == 0 and _padded(width) <= _MOST_VALUES)


@torch.library.custom_op("m2ray::normed_float8", mutates_args=())
def normed_float8(
    stream_NH: torch.Tensor, beside_NH: torch.Tensor | None, weight_H: torch.Tensor, epsilon: float, *, is_wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm by the root of the mean of squares of a stream, or of its sum with what lies beside it, rounded as `round_rows` does of bfloat16.

    Args:
        is_wide: whether what is normed is wanted unrounded too.

    Returns:
        FP8 [N, H]; float32 [N, H / 128]; what is normed in float32 [N, H], or [0, H].
    """
    stream_NH = stream_NH.contiguous()
    beside_NH = None if beside_NH is None else beside_NH.contiguous()
    wide_NH = stream_NH.new_empty((len(stream_NH) if is_wide else 0, stream_NH.shape[1]), dtype=torch.float32)
    if not stream_NH.is_cuda or not stream_NH.numel():
        normed_NH = _normed(stream_NH, beside_NH, weight_H, epsilon)
        return *rounded(normed_NH.bfloat16()), normed_NH[: len(wide_NH)]
    values, scales = torch.empty_like(stream_NH, dtype=FP8), wide_NH.new_empty((len(stream_NH), stream_NH.shape[1] // BLOCK))
    _launch(stream_NH, beside_NH, weight_H, values, scales, wide_NH if is_wide else None, epsilon)
    return values, scales, wide_NH


@normed_float8.register_fake
def _(
    stream_NH: torch.Tensor, _: torch.Tensor | None, __: torch.Tensor, ___: float, *, is_wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Not `len`: it makes a number of a size that is open, and each shape would be compiled again.
    num_rows, width = stream_NH.shape
    scales = stream_NH.new_empty((num_rows, width // BLOCK), dtype=torch.float32)
    return stream_NH.new_empty((num_rows, width), dtype=FP8), scales, scales.new_empty((num_rows if is_wide else 0, width))


def _normed(stream_NH: torch.Tensor, beside_NH: torch.Tensor | None, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """By torch, in float64 where that is given, else in float32."""
    dtype = torch.promote_types(stream_NH.dtype, torch.float32)
    sum_NH = stream_NH.to(dtype) if beside_NH is None else stream_NH.to(dtype) + beside_NH.to(dtype)
    return sum_NH * (sum_NH.square().mean(1, keepdim=True) + epsilon).rsqrt() * weight_H.to(dtype)


def _launch(
    stream_NH: torch.Tensor,
    beside_NH: torch.Tensor | None,
    weight_H: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    wide_NH: torch.Tensor | None,
    epsilon: float,
) -> None:
    """By a program a row."""
    num_rows, width = stream_NH.shape
    warps = max(_padded(width) // _WARP_VALUES, 1)
    given = stream_NH, beside_NH, weight_H, values, scales, wide_NH, epsilon
    with torch.cuda.device(stream_NH.device):
        _kernel()[num_rows,](*given, width, _padded(width) // BLOCK, num_warps=warps)


def _padded(width: int) -> int:
    return max(BLOCK, 1 << (width - 1).bit_length())


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device that norms and rounds as torch does."""
    return rounding.has_kernel(device) and is_proved(device, "Norms are rounded to FP8", _problem)


def _problem(device: torch.device) -> str:
    """Of rows of blocks that are no power of two, one of zeros, one part and two."""
    generator = torch.Generator(device).manual_seed(0)
    stream_NH, beside_NH = (3 * torch.randn((77, 3 * BLOCK), generator=generator, device=device).bfloat16() for _ in range(2))
    weight_H = torch.rand(3 * BLOCK, generator=generator, device=device).bfloat16() + 0.5
    stream_NH[7] = 0
    for given in ((stream_NH, None), (stream_NH, beside_NH)):
        exact_NH = _normed(stream_NH.double(), given[1], weight_H, 1e-6)
        values, scales, wide_NH = normed_float8(*given, weight_H, 1e-6, is_wide=True)
        if not ((wide_NH - exact_NH).abs() <= exact_NH.abs() * 1e-5).all():  # what is no number is not within
            return "its norms are not those of torch"
        if not is_near((values, scales), rounded(exact_NH.bfloat16())):
            return "it rounds norms otherwise than torch"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.float8.rounding_kernel import round_norm

    return round_norm
