"""Activations as FP8, with a scale for each 128 values of a row, as models that were published so are served.

`scale = max(|x|) / 448`, 448 being the largest number of float8_e4m3fn, and `x / scale` rounded to it: transformers' finegrained_fp8, DeepGEMM
and vLLM round alike, but for what they do with values of next to nothing. On a GPU one kernel reads the rows once.
"""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from m2ray.model.graph_values import unshaped
from m2ray.model.kernel_proof import is_proved

BLOCK = 128
"""Values of a row that share a scale, and rows and columns of a weight that do."""

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max

_LEAST = 1e-10
"""Of a block's largest value: zeros have a scale too."""

_LEAST_CAPABILITY = (8, 9)
_BLOCKS = 32
"""That a program of the kernel rounds."""


@torch.library.custom_op("m2ray::round_float8", mutates_args=())
def round_rows(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, W] of any float dtype as FP8 [N, W], and the scales of their blocks, float32 [N, W / 128]. W is a multiple of 128.

    A block that holds what is not finite gives NaN.
    """
    rows_NW = rows_NW.contiguous()
    if not rows_NW.is_cuda or not rows_NW.numel() or not has_kernel(rows_NW.device):
        return rounded(rows_NW)
    values, scales = torch.empty_like(rows_NW, dtype=FP8), rows_NW.new_empty((len(rows_NW), rows_NW.shape[1] // BLOCK), dtype=torch.float32)
    with torch.cuda.device(rows_NW.device):
        _kernel()[-(-scales.numel() // _BLOCKS),](rows_NW, values, scales, scales.numel(), _BLOCKS)
    return values, scales


@round_rows.register_fake
def _(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = rows_NW.new_empty((rows_NW.shape[0], rows_NW.shape[1] // BLOCK), dtype=torch.float32)
    return torch.empty_like(rows_NW, dtype=FP8, memory_format=torch.contiguous_format), scales


def rounded(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch."""
    blocks = rows_NW.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True).float().clamp(min=_LEAST) / _LARGEST
    return (blocks / scales).to(FP8).flatten(-2), scales.squeeze(-1)  # by float32 they are divided in float32, without a copy in it


def share_rounded(graph: Graph) -> None:
    """Round what several projections take once."""
    found: dict[tuple[Any, Any], Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.m2ray.round_float8.default):
        rows: Any = node.args[0]
        first = found.setdefault((unshaped(rows), rows.meta["val"].shape[1]), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device that rounds as torch does."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and is_proved(device, "Activations are rounded to FP8", _problem)
    )


def _problem(device: torch.device) -> str:
    """Of blocks that are no whole number of programs', one of zeros and one of the smallest numbers."""
    rows_NW = torch.randn((333, 3 * BLOCK), generator=torch.Generator(device).manual_seed(0), device=device).exp2().exp2().clamp(max=6e4)
    rows_NW[7], rows_NW[8] = 0, rows_NW[8] * 1e-38
    for each_NW in (rows_NW, rows_NW.bfloat16(), -rows_NW.half()):
        values, scales = torch.empty_like(each_NW, dtype=FP8), each_NW.new_empty((len(each_NW), 3), dtype=torch.float32)
        _kernel()[-(-scales.numel() // _BLOCKS),](each_NW, values, scales, scales.numel(), _BLOCKS)
        if not is_near((values, scales), rounded(each_NW)):
            return "it rounds otherwise than torch"
    return ""


def is_near(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether rounded values are those that are expected within one step of FP8, and all but few of them the same: torch divides by 448 on a CPU, and
    multiplies on a GPU.
    """
    steps = expected[1].repeat_interleave(BLOCK, 1)
    value, wanted = found[0].float() * found[1].repeat_interleave(BLOCK, 1), expected[0].float() * steps
    is_step = (value - wanted).abs() <= wanted.abs() * 0.15 + steps * 2.0**-8
    return bool(is_step.all() and (value - wanted).norm() <= wanted.norm() * 2.0**-8)  # what is no number is not within


@cache
def _kernel() -> Any:
    from m2ray.model.float8.rounding_kernel import round_blocks

    return round_blocks
