"""The choice of experts in compiled layers on a GPU, by one kernel."""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from m2ray.model.kernel_proof import is_proved

_MOST_COLUMNS, _MOST_CHOSEN = 1024, 16
"""Of what a program of the kernel holds at a time."""

_ROWS = 4


def replace_choice(graph: Graph) -> None:
    """Put `largest` in the place of torch's topk, wherever it computes the same."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
        if not node.kwargs and _is_choice(*node.args):
            with graph.inserting_before(node):
                found = graph.call_function(torch.ops.m2ray.largest.default, node.args[:2])
            found.meta.update(node.meta)
            node.replace_all_uses_with(found)
            graph.erase_node(node)


def _is_choice(scores: Node, num_chosen: int | Node, axis: int = -1, largest: bool = True, _: bool = True) -> bool:  # noqa: FBT001, FBT002 - topk's
    """Whether it takes the largest few along the last axis, and the kernel holds that."""
    value = scores.meta["val"]
    width = value.shape[-1]
    is_last = largest and axis in (-1, value.dim() - 1) and value.dtype in (torch.float32, torch.bfloat16)
    return is_last and isinstance(num_chosen, int) and num_chosen <= _MOST_CHOSEN and isinstance(width, int) and width <= _MOST_COLUMNS


@torch.library.custom_op("m2ray::largest", mutates_args=())
def largest(scores: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values along the last axis, in falling order, and their places, int64; of equal values the first."""
    if not scores.is_cuda or not scores.numel():
        values, places = scores.sort(dim=-1, descending=True, stable=True)
        return values[..., :num_chosen].clone(), places[..., :num_chosen].clone()
    scores, width = scores.contiguous(), scores.shape[-1]
    num_rows, shape = scores.numel() // width, (*scores.shape[:-1], num_chosen)
    values, places = scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)
    columns = 1 << (width - 1).bit_length()
    _kernel()[-(-num_rows // _ROWS),](scores, values, places, num_rows, width, num_chosen, _ROWS, columns)
    return values, places


@largest.register_fake
def _(scores: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*scores.shape[:-1], num_chosen)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device that chooses as torch does."""
    return is_proved(device, "Experts are chosen", _problem)


def _problem(device: torch.device) -> str:
    """Of rows that are no whole number of programs', some with many values that are equal."""
    scores_NE = torch.randn((515, 72), generator=torch.Generator(device).manual_seed(0), device=device)
    for each_NE in (scores_NE, scores_NE.bfloat16(), scores_NE.round()):
        (values_NK, places_NK), (expected_NE, first_NE) = largest(each_NE, 6), each_NE.sort(dim=-1, descending=True, stable=True)
        if not (torch.equal(values_NK, expected_NE[:, :6]) and torch.equal(places_NK, first_NE[:, :6])):
            return "it takes others than torch does"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.experts_kernel import top_k

    return top_k
