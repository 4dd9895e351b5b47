"""Causal attention in compiled layers on a GPU of Hopper's kind, by one kernel for all shapes."""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_FLASH = _ATEN._scaled_dot_product_flash_attention.default  # noqa: SLF001 - has no public name
_TURN = [0, 2, 1, 3]
_WIDTHS = (64, 128)
_LOG2_E = 1.4426950408889634
_CAPABILITY = 9


def replace_attention(graph: Graph) -> None:
    """Put `causal_attention` in the place of FlashAttention 2, wherever it computes the same."""
    for node in graph.find_nodes(op="call_function", target=_FLASH):
        if _is_plain(node):
            _replace(graph, node)


def _is_plain(node: Node) -> bool:
    """Whether it is causal, without dropout, over as many keys as queries, of a head size that the kernel has, and nothing but the sums is used."""
    arguments: Any = node.args
    query, key, value = (each.meta["val"] for each in arguments[:3])
    dropout, is_causal = arguments[3:5] if len(arguments) > 4 else (0.0, False)
    users: Any = node.users
    return bool(
        dropout == 0.0
        and is_causal is True
        and query.dtype == torch.bfloat16
        and query.shape[3] in _WIDTHS
        and query.shape[3] == value.shape[3]
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
    return graph.call_function(_ATEN.clone.default, (permuted,), {"memory_format": torch.contiguous_format})


def _turns(node: Any) -> bool:
    return bool(node.target == _ATEN.permute.default and list(node.args[1]) == _TURN)


@torch.library.custom_op("m2ray::causal_attention", mutates_args=())
def causal_attention(query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGD: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Each position's sum of the values up to it [B, T, A, D]; several heads share the keys and values of one."""
    if not query_BTAD.is_cuda or not query_BTAD.numel():
        return _by_torch(query_BTAD, key_BTGD, value_BTGD, scale)
    scale = query_BTAD.shape[3] ** -0.5 if scale is None else scale
    return _by_kernel(query_BTAD.contiguous(), key_BTGD.contiguous(), value_BTGD.contiguous(), scale)


@causal_attention.register_fake
def _(query_BTAD: torch.Tensor, _: torch.Tensor, __: torch.Tensor, ___: float | None) -> torch.Tensor:
    return torch.empty_like(query_BTAD, memory_format=torch.contiguous_format)


def _by_torch(query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGD: torch.Tensor, scale: float | None) -> torch.Tensor:
    query, key, value = (each.transpose(1, 2) for each in (query_BTAD, key_BTGD, value_BTGD))
    summed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return summed.transpose(1, 2).contiguous()


def _by_kernel(query_BTAD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGD: torch.Tensor, scale: float) -> torch.Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    num_sequences, length, heads, width = query_BTAD.shape
    rows, columns, warps, stages = 64, 64, 4, 3
    summed_BTAD = torch.empty_like(query_BTAD)

    def tiles(each: torch.Tensor, at_once: int) -> Any:
        return TensorDescriptor.from_tensor(each.view(num_sequences * length, -1), [at_once, width])

    _kernel()[num_sequences * heads, -(-length // rows)](
        tiles(query_BTAD, rows),
        tiles(key_BTGD, columns),
        tiles(value_BTGD, columns),
        summed_BTAD,
        length,
        scale * _LOG2_E,
        heads,
        heads // key_BTGD.shape[2],
        width,
        rows,
        columns,
        num_warps=warps,
        num_stages=stages,
    )
    return summed_BTAD


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
    for width, length in ((128, 300), (64, 5)):
        query, key, value = (torch.randn((2, length, heads, width), generator=generator, device=device).bfloat16() for heads in (6, 2, 2))
        exact = _by_torch(query.double(), key.double(), value.double(), None)
        plain = _by_torch(query, key, value, None)
        found = causal_attention(query, key, value, None)
        of_largest = (found - exact).abs().max() / (plain - exact).abs().max()
        if not (of_largest <= 1.5 and (found - exact).norm() <= 1.05 * (plain - exact).norm()):  # what is no number is not within
            return f"its sums of heads of {width} are further off than torch's"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.attention_kernel import causal_attention as kernel

    return kernel
