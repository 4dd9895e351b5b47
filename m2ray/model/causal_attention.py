"""Causal attention in compiled layers on a GPU of Hopper's kind, by one kernel for all shapes."""

from functools import cache
from itertools import product
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_FLASH = _ATEN._scaled_dot_product_flash_attention.default  # noqa: SLF001 - has no public name
_EFFICIENT = _ATEN._scaled_dot_product_efficient_attention.default  # noqa: SLF001 - likewise
_TURN = [0, 2, 1, 3]
_WIDTHS = (64, 64), (128, 128), (192, 128)
"""Of keys and of values. FlashAttention 2 takes none that differ, as DeepSeek's do: there torch has its memory-efficient attention."""

_BLOCK, _PIECE, _STEP = 128, 64, 8
"""What the kernel's programs take at once: positions; of a query's and a key's width; elements in 16 bytes."""

_CACHED_BYTES = 24 * 1024 * 1024
"""Of keys and values that programs work on at a time: about half of what the GPU's cache holds."""

_LOG2_E = 1.4426950408889634
_CAPABILITY = 9


def replace_attention(graph: Graph) -> None:
    """Put `causal_attention` in the place of FlashAttention 2 and of the memory-efficient attention, wherever it computes the same."""
    for node in graph.find_nodes(op="call_function", target=_FLASH):
        if len(node.args) > 4 and _is_plain(node, *node.args[3:5]):
            _replace(graph, node)
    for node in graph.find_nodes(op="call_function", target=_EFFICIENT):
        if len(node.args) > 6 and node.args[3] is None and _is_plain(node, *node.args[5:7]):
            _replace(graph, node)


def _is_plain(node: Node, dropout: Any, is_causal: Any) -> bool:
    """Whether it is causal, without dropout, over as many keys as queries, of widths that the kernel has, and nothing but the sums is used."""
    arguments: Any = node.args
    query, key, value = (each.meta["val"] for each in arguments[:3])
    users: Any = node.users
    return bool(
        dropout == 0.0
        and is_causal is True
        and query.dtype == torch.bfloat16
        and (query.shape[3], value.shape[3]) in _WIDTHS
        and query.shape[2] == key.shape[2]
        and all(user.args[1] == 0 or not user.users for user in users)
    )


def _replace(graph: Graph, node: Node) -> None:
    """The kernel's axes are in another order: [B, T, heads, D], as projections make them."""
    with graph.inserting_before(node):
        turned = [_turned(graph, each) for each in node.args[:3]]
        summed = graph.call_function(torch.ops.m2ray.causal_attention.default, (*turned, node.kwargs.get("scale")))
        result = graph.call_function(_ATEN.permute.default, (summed, _TURN))
    for user in list(node.users):
        for after in list(user.users):
            if _turns(after):
                for copied in [each for each in after.users if each.target == _ATEN.clone.default]:
                    copied.replace_all_uses_with(summed)
                    graph.erase_node(copied)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def _turned(graph: Graph, node: Any) -> Node:
    """With the second and the third axis changed, as it lies in memory."""
    if _turns(node):
        return node.args[0]  # type: ignore[no-any-return]
    permuted = graph.call_function(_ATEN.permute.default, (node, _TURN))
    permuted.meta["val"] = node.meta["val"].transpose(1, 2)
    _, of_head, of_position, last = node.meta["val"].stride()
    if isinstance(of_head, int) and isinstance(of_position, int) and of_position >= of_head and last == 1:
        return permuted  # as DeepSeek's values, which lie beside its keys
    cloned = graph.call_function(_ATEN.clone.default, (permuted,), {"memory_format": torch.contiguous_format})
    cloned.meta["val"] = permuted.meta["val"].contiguous()
    return cloned


def _turns(node: Any) -> bool:
    return bool(node.target == _ATEN.permute.default and list(node.args[1]) == _TURN)


@torch.library.custom_op("m2ray::causal_attention", mutates_args=())
def causal_attention(query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGE: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Each position's sum of the values up to it [B, T, A, E]; several heads share the keys and values of one."""
    if not query_BTAD.is_cuda or not query_BTAD.numel():
        return summed_by_torch(query_BTAD, key_BTGD, value_BTGE, scale)
    summed_BTAE = query_BTAD.new_empty((*query_BTAD.shape[:3], value_BTGE.shape[3]))
    summed_by_kernel(query_BTAD, key_BTGD, value_BTGE, scale, summed_BTAE)
    return summed_BTAE


@causal_attention.register_fake
def _(query_BTAD: torch.Tensor, _: torch.Tensor, value_BTGE: torch.Tensor, __: float | None) -> torch.Tensor:
    return query_BTAD.new_empty((*query_BTAD.shape[:3], value_BTGE.shape[3]))


def summed_by_torch(query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGE: torch.Tensor, scale: float | None) -> torch.Tensor:
    """What `causal_attention` is, by torch, in the dtype that is given."""
    query, key, value = (each.transpose(1, 2) for each in (query_BTAD, key_BTGD, value_BTGE))
    is_shared = query.shape[1] != key.shape[1]
    summed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_shared)
    return summed.transpose(1, 2).contiguous()


def summed_by_kernel(
    query_BTAD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTGE: torch.Tensor,
    scale: float | None,
    summed_BTAE: torch.Tensor,
    scales_BTA: torch.Tensor | None = None,
) -> None:
    """By a program on each of the GPU's processors, which goes on from tile to tile. In bfloat16, or in FP8 with a scale for each 128 sums."""
    num_sequences, length, heads, width = query_BTAD.shape
    shared, out_width = value_BTGE.shape[2:]
    group, num_pairs = heads // shared, num_sequences * heads
    section = max(1, _CACHED_BYTES // (length * (width + out_width) * value_BTGE.itemsize)) * group
    kernel, blocks_of = _kernel()
    programs = min(_processors(query_BTAD.device), -(-length // _BLOCK) * num_pairs)
    with torch.cuda.device(query_BTAD.device):
        kernel[programs,](
            blocks_of(query_BTAD, _PIECE),
            blocks_of(key_BTGD, _PIECE),
            blocks_of(value_BTGE, out_width),
            summed_BTAE,
            scales_BTA,
            length,
            heads,
            group,
            num_pairs,
            section,
            (width**-0.5 if scale is None else scale) * _LOG2_E,
            PIECES=width // _PIECE,
            WIDTH=out_width,
            num_warps=4,
        )


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device that is as near to float64's attention as torch's is."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _CAPABILITY
        and is_proved(device, "Attention is computed", _problem)
    )


def _problem(device: torch.device) -> str:
    generator = torch.Generator(device).manual_seed(0)
    for (width, out_width), (num_sequences, length) in product(_WIDTHS, ((2, 5), (8, 300))):  # some programs have several tiles
        shared = 2 if width == out_width else 6  # torch's own for widths that differ shares none
        query, key, value = (
            torch.randn((num_sequences, length, heads, each), generator=generator, device=device).bfloat16()
            for heads, each in ((6, width), (shared, width), (shared, out_width))
        )
        exact = summed_by_torch(query.double(), key.double(), value.double(), None)
        plain = summed_by_torch(query, key, value, None)
        found = causal_attention(query, key, value, None)
        of_largest = (found - exact).abs().max() / (plain - exact).abs().max()
        if not (of_largest <= 1.5 and (found - exact).norm() <= 1.05 * (plain - exact).norm()):  # what is no number is not within
            return f"its sums of heads of {width} are further off than torch's"
    return ""


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel() -> Any:
    """The kernel, and what makes of a tensor [B, T, heads, width] its descriptor by blocks."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from m2ray.model.attention_kernel import causal_attention as kernel

    blocks = {width: [1, _BLOCK, 1, width] for width in {_PIECE, *(out_width for _, out_width in _WIDTHS)}}
    layouts = {width: gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16) for width, block in blocks.items()}

    def blocks_of(each: torch.Tensor, width: int) -> Any:
        return TensorDescriptor.from_tensor(_reachable(each), blocks[width], layouts[width])

    return kernel, blocks_of


def _reachable(each: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it: the unit that copies blocks takes steps of 16 bytes."""
    *steps, last = each.stride()
    is_so = last == 1 and all(step and step % _STEP == 0 for step in steps) and each.data_ptr() % (_STEP * each.itemsize) == 0
    return each if is_so else each.contiguous()
