"""Attention whose sums are rounded to FP8 as they are written, where a projection multiplies them: in compiled layers on a GPU of Hopper's kind."""

from functools import cache
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph

from m2ray.model import causal_attention
from m2ray.model.causal_attention import summed_by_kernel, summed_by_torch
from m2ray.model.float8 import rounding
from m2ray.model.float8.rounding import BLOCK, FP8, is_near, rounded
from m2ray.model.graph_values import takers, unshaped
from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_WIDTHS = (128, 192)
"""Of keys beside values of 128, each of which is a block."""


def replace_rounded(graph: Graph) -> None:
    """Put `causal_attention_float8` in the place of `causal_attention` and of its sums' rounding, where nothing else is given them."""
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=torch.ops.m2ray.round_float8.default):
        summed: Any = unshaped(node.args[0])
        if summed.target != torch.ops.m2ray.causal_attention.default or takers(summed) != [node]:
            continue
        if summed.args[2].meta["val"].shape[3] != BLOCK:
            continue
        with graph.inserting_before(node):
            result = graph.call_function(torch.ops.m2ray.causal_attention_float8.default, summed.args)
            for number, rows in enumerate(node.meta["val"]):
                each = graph.call_function(getitem, (result, number))
                flat = graph.call_function(_ATEN.reshape.default, (each, [-1, rows.shape[1]]))
                for user in [user for user in node.users if user.args[1] == number]:
                    user.replace_all_uses_with(flat)
                    graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()


@torch.library.custom_op("m2ray::causal_attention_float8", mutates_args=())
def causal_attention_float8(
    query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGE: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's sum of the values up to it, in bfloat16 and then in FP8 [B, T, A, 128], and each head's scale, float32 [B, T, A]."""
    if not query_BTAD.is_cuda or not query_BTAD.numel():
        values, scales = rounded(summed_by_torch(query_BTAD, key_BTGD, value_BTGE, scale).flatten(0, 2))
        return values.view(*query_BTAD.shape[:3], BLOCK), scales.view(query_BTAD.shape[:3])
    values = query_BTAD.new_empty((*query_BTAD.shape[:3], BLOCK), dtype=FP8)
    scales = query_BTAD.new_empty(query_BTAD.shape[:3], dtype=torch.float32)
    summed_by_kernel(query_BTAD, key_BTGD, value_BTGE, scale, values, scales)
    return values, scales


@causal_attention_float8.register_fake
def _(query_BTAD: torch.Tensor, _: torch.Tensor, __: torch.Tensor, ___: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    values = query_BTAD.new_empty((*query_BTAD.shape[:3], BLOCK), dtype=FP8)
    return values, query_BTAD.new_empty(query_BTAD.shape[:3], dtype=torch.float32)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device that rounds attention's sums as torch does."""
    return (
        causal_attention.has_kernel(device) and rounding.has_kernel(device) and is_proved(device, "Attention is rounded to FP8", _problem)
    )


def _problem(device: torch.device) -> str:
    """Against the same sums in bfloat16: of sequences that end within a tile, and of more tiles than a GPU has processors."""
    generator = torch.Generator(device).manual_seed(0)
    for width in _WIDTHS:
        for num_sequences, length in ((2, 5), (8, 300)):
            query, key, value = (
                torch.randn((num_sequences, length, 6, each), generator=generator, device=device).bfloat16()
                for each in (width, width, BLOCK)
            )
            expected = rounded(causal_attention.causal_attention(query, key, value, None).flatten(0, 2))
            values, scales = causal_attention_float8(query, key, value, None)
            if not is_near((values.flatten(0, 2), scales.view(-1, 1)), expected):
                return f"its sums of heads of {width} are not those of torch"
    return ""
