"""Queries and keys in compiled layers on a GPU: normed and turned by their positions by one kernel, which reads and writes each once."""

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from m2ray.model.graph_values import SHAPED, is_given, is_written, matches, norm_of
from m2ray.model.kernel_proof import is_proved

_ATEN = torch.ops.aten
_END = sys.maxsize
_TURN = [0, 2, 1, 3]

_HALVES = [(_ATEN.neg.default, (_ATEN.slice.Tensor, "turning", 3, "half", _END)), (_ATEN.slice.Tensor, "turning", 3, 0, "half")]
_BY_COS = (_ATEN.mul.Tensor, "turning", (_ATEN.unsqueeze.default, "cos", 1))
_BY_SIN = (_ATEN.mul.Tensor, (_ATEN.cat.default, _HALVES, -1), (_ATEN.unsqueeze.default, "sin", 1))
_TURNED = (_ATEN.add.Tensor, _BY_COS, _BY_SIN)
"""transformers' apply_rotary_pos_emb of all of each head."""

_PARTLY = (_ATEN.cat.default, [_TURNED, (_ATEN.slice.Tensor, "heads", 3, "both", _END)], -1)
_TURNING = (_ATEN.slice.Tensor, "heads", 3, 0, "both")
"""The same of the first values of each head, and which these are."""

_LEAST_CAPABILITY = (8, 0)
_MOST_VALUES = 16384
"""Of a token, which a program of the kernel holds at once."""

_WARPS, _WARPS_OF_ALL, _WARP_VALUES = 4, 2, 4096
"""Of a program, and of one that sums over all heads, where warps wait for one another; and what one holds at most."""


class _Turned(NamedTuple):
    """Heads of a graph that were turned, as `turned_heads` is given them."""

    given: Node
    weight: Node | None
    cos: Node
    sin: Node
    width: int
    epsilon: float


def replace_turned(graph: Graph) -> None:
    """Put `turned_heads` in the place of what turns a product's heads as transformers does, with the norm before it, of each head or of all together."""
    for node in reversed(graph.nodes):
        if node.target in (_ATEN.cat.default, _ATEN.add.Tensor) and node.users and (found := _found(node)):
            with graph.inserting_before(node):
                turned = graph.call_function(torch.ops.m2ray.turned_heads.default, tuple(found))
                result = graph.call_function(_ATEN.permute.default, (turned, _TURN))
            result.meta.update(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _found(node: Node) -> _Turned | None:
    """Of what heads [B, A, T, D] were turned; None where they were not, or as the kernel does not."""
    found: dict[str, Any] = {}
    if matches(_PARTLY, node, found):
        is_turned = matches(_TURNING, found["turning"], found)
    else:
        is_turned = matches(_TURNED, node, found := {})
        found["heads"] = found.get("turning")
    if not (is_turned and matches((_ATEN.permute.default, "laid", _TURN), found["heads"], found)):
        return None
    laid: Any = found["laid"]
    given, weight, epsilon = _unnormed(laid)
    while given.target in SHAPED and given.meta["val"].dim() > 3:
        given = given.args[0]
    turned = _Turned(given, weight, found["cos"], found["sin"], laid.meta["val"].shape[3], epsilon)
    return turned if _fits(turned, laid, found["half"]) else None


def _unnormed(laid: Node) -> tuple[Any, Node | None, float]:
    """Of what heads [B, T, A, D] are the norm, its weight and its epsilon; they themselves, None and 0 where they are none."""
    return norm_of(laid) or (norm_of(laid.args[0]) if laid.target in SHAPED else None) or (laid, None, 0.0)


def _fits(turned: _Turned, laid: Node, half: Any) -> bool:
    """Whether the kernel takes it: what lies in memory in bfloat16, [B, T, heads * width], and parts of heads that are powers of two."""
    given, weight, cos, sin, width, _ = turned
    if not (is_written(given) and is_given(cos) and is_given(sin) and isinstance(half, int)):
        return False
    num_sequences, length, heads, _ = laid.meta["val"].shape
    of_cos, of_sin, rest = cos.meta["val"].shape, sin.meta["val"].shape, width - 2 * half
    return bool(
        given.meta["val"].shape == (num_sequences, length, heads * width)
        and (weight is None or weight.meta["val"].shape[0] in (width, heads * width))
        and of_cos == of_sin == (of_cos[0], length, 2 * half)
        and isinstance(heads, int)
        and half & (half - 1) == rest & (rest - 1) == 0
        and _padded(heads) * width <= _MOST_VALUES
    )


@torch.library.custom_op("m2ray::turned_heads", mutates_args=())
def turned_heads(
    given_BTW: torch.Tensor, weight: torch.Tensor | None, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor, width: int, epsilon: float
) -> torch.Tensor:
    """Heads [B, T, A, width] of what a projection gave [B, T, A * width], in its dtype: normed and turned in float32, rounded once.

    Args:
        weight: of a norm by the root of the mean of squares, of each head [width] or of all of them together [A * width]; None without a norm.
        cos_BTR, sin_BTR: of each position's angles, B may be 1. The first R values of a head are turned, the first half of them with the second; the rest stay.
        epsilon: added to the mean of squares.
    """
    if not given_BTW.is_cuda or not given_BTW.numel():
        return _by_torch(given_BTW, weight, cos_BTR, sin_BTR, width, epsilon).to(given_BTW.dtype)
    return _by_kernel(given_BTW.contiguous(), weight, cos_BTR.contiguous(), sin_BTR.contiguous(), width, epsilon)


@turned_heads.register_fake
def _(given_BTW: torch.Tensor, _: torch.Tensor | None, __: torch.Tensor, ___: torch.Tensor, width: int, ____: float) -> torch.Tensor:
    return given_BTW.new_empty((*given_BTW.shape[:2], given_BTW.shape[2] // width, width))


def _by_torch(
    given_BTW: torch.Tensor, weight: torch.Tensor | None, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor, width: int, epsilon: float
) -> torch.Tensor:
    """In float64 where that is given, else in float32."""
    dtype = torch.promote_types(given_BTW.dtype, torch.float32)
    heads_BTAD = given_BTW.to(dtype).unflatten(2, (-1, width))
    if weight is not None:
        axes = (3,) if weight.numel() == width else (2, 3)
        mean = heads_BTAD.square().mean(axes, keepdim=True)
        heads_BTAD = heads_BTAD * (mean + epsilon).rsqrt() * weight.to(dtype).view(-1, width)
    cos, sin = (each.to(dtype)[:, :, None] for each in (cos_BTR, sin_BTR))
    turning, rest = heads_BTAD.split((cos.shape[3], width - cos.shape[3]), 3)
    first, second = turning.chunk(2, 3)
    return torch.cat([turning * cos + torch.cat([-second, first], 3) * sin, rest], 3)


def _by_kernel(
    given_BTW: torch.Tensor, weight: torch.Tensor | None, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor, width: int, epsilon: float
) -> torch.Tensor:
    """By a program a token."""
    num_sequences, length, total = given_BTW.shape
    turned_BTAD = given_BTW.new_empty((num_sequences, length, total // width, width))
    num_angles = cos_BTR.shape[0] * length
    is_each = weight is None or len(weight) == width
    sizes = total // width, _padded(total // width), width, cos_BTR.shape[2] // 2, is_each
    warps = max(_WARPS if is_each else _WARPS_OF_ALL, _padded(total // width) * width // _WARP_VALUES)
    with torch.cuda.device(given_BTW.device):
        _kernel()[num_sequences * length,](given_BTW, weight, cos_BTR, sin_BTR, turned_BTAD, num_angles, epsilon, *sizes, num_warps=warps)
    return turned_BTAD


def _padded(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for this device whose heads are one rounding from float64's."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and is_proved(device, "Heads are turned", _problem)
    )


def _problem(device: torch.device) -> str:
    """Of heads that are no power of two, turned in part and whole, with each norm; each sequence with positions of its own, or all with the same."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    for half, of_norm, num_angles in ((32, 6 * 128, 1), (32, 0, 3), (64, 128, 3)):
        given_BTW, weight = 4 * drawn(3, 37, 6 * 128), drawn(of_norm) if of_norm else None
        angles = drawn(num_angles, 37, 2 * half), drawn(num_angles, 37, 2 * half)
        exact = _by_torch(given_BTW.double(), weight, *angles, 128, 1e-6)
        found = turned_heads(given_BTW, weight, *angles, 128, 1e-6)
        if not ((found - exact).abs() <= exact.abs() * 2.0**-7.99 + 1e-5).all():  # what is no number is not within
            return "it is more than one rounding off"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.rotary_kernel import turn_heads

    return turn_heads
