"""A router's float32 product in compiled layers on a GPU of Hopper's kind, by tensor cores: each float32 value as two of float16."""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_CAPABILITY = 9
_MOST_COLUMNS, _LEAST_WIDTH = 512, 1024
"""Of a router's weight. Many columns are another product's; float32 is as near to the exact result as 22 bits of each value where few are summed."""

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
"""Of a tile, and what of it is multiplied at a time."""

_SCALE = 0.25
"""Of hidden states: a norm makes none of 262,000, and float16 ends at 65,504."""

_WARPS, _STAGES, _BLOCK = 8, 3, 1024


def replace_product(graph: Graph) -> None:
    """Put `router_logits` in the place of torch's float32 product, wherever hidden states that were rounded are multiplied in float32 for a router."""
    for node in graph.find_nodes(op="call_function", target=_ATEN.mm.default):
        hidden, turned = node.args
        if _is_router(hidden, turned):
            with graph.inserting_before(node):
                logits = graph.call_function(torch.ops.m2ray.router_logits.default, (hidden, turned.args[0]))
            logits.meta.update(node.meta)
            node.replace_all_uses_with(logits)
            graph.erase_node(node)


def _is_router(hidden: Node, turned: Node) -> bool:
    """Whether it is [N, H] in float32, made of another dtype, times few columns of a weight [E, H], of a width for which the kernel is the better."""
    if hidden.target != _CONVERT or turned.target != _ATEN.permute.default:
        return False
    weight_EH: Any = turned.args[0]
    given: Any = hidden.args[0]
    weight = weight_EH.meta["val"]
    columns, width = weight.shape
    return bool(
        given.meta["val"].dtype == torch.bfloat16
        and hidden.meta["val"].dtype == weight.dtype == torch.float32
        and isinstance(columns, int)
        and columns <= _MOST_COLUMNS
        and width >= _LEAST_WIDTH
        and width % _DEPTH == 0
    )


@torch.library.custom_op("m2ray::router_logits", mutates_args=())
def router_logits(hidden_NH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """The product [N, E] of float32 hidden states and a float32 weight, no further from the exact one than torch's."""
    if not hidden_NH.is_cuda or not hidden_NH.numel():
        return hidden_NH @ weight_EH.T
    from triton.tools.tensor_descriptor import TensorDescriptor

    hidden_NH, weight_EH = hidden_NH.contiguous(), weight_EH.contiguous()
    (rows, width), columns = hidden_NH.shape, len(weight_EH)
    padded = -(-columns // _COLUMNS) * _COLUMNS
    parts_PH = weight_EH.new_empty((2 * padded, width), dtype=torch.float16)
    _kernels().split_weight[-(-padded * width // _BLOCK),](weight_EH, parts_PH, weight_EH.numel(), padded * width, _BLOCK)
    logits_NE = hidden_NH.new_empty((rows, columns))
    _kernels().multiply_parts[-(-rows // _ROWS) * (padded // _COLUMNS),](
        TensorDescriptor.from_tensor(hidden_NH, [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(parts_PH, [_COLUMNS, _DEPTH]),
        logits_NE,
        rows,
        width,
        columns,
        padded,
        _ROWS,
        _COLUMNS,
        _DEPTH,
        _SCALE,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return logits_NE


@router_logits.register_fake
def _(hidden_NH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    return hidden_NH.new_empty((hidden_NH.shape[0], weight_EH.shape[0]))


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device whose products are as near to float64's as torch's float32 ones."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _CAPABILITY
        and is_proved(device, "A router's product is computed", _problem)
    )


def _problem(device: torch.device) -> str:
    """Of rows and columns that are no whole number of tiles, and hidden states of several magnitudes."""
    generator = torch.Generator(device).manual_seed(0)
    hidden_NH = torch.randn((300, 3072), generator=generator, device=device)
    weight_EH = torch.randn((200, 3072), generator=generator, device=device) / 64
    for scale in (1.0, 1e-3, 1e4):
        exact_NE = (hidden_NH * scale).double() @ weight_EH.double().T
        plain_NE, found_NE = (hidden_NH * scale) @ weight_EH.T, router_logits(hidden_NH * scale, weight_EH)
        if not (found_NE - exact_NE).norm() <= (plain_NE - exact_NE).norm():  # what is no number is not within
            return "it is further off than torch's"
    return ""


@cache
def _kernels() -> Any:
    from m2ray.model import router_kernel

    return router_kernel
