"""A mixture's experts in compiled layers on a GPU: the steps of transformers' `grouped_mm`, with kernels of our own around its products."""

from functools import cache
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from m2ray.model import expert_products
from m2ray.model.expert_sums import MOST_COLUMNS, add_rows, sum_rows, summed
from m2ray.model.kernel_proof import is_proved

NAME = "m2ray"
"""Of these experts among transformers' implementations."""

_TRANSFORMERS_OWN = "grouped_mm"
_LEAST_CAPABILITY = (8, 0)
"""Of a GPU on which torch has grouped products. transformers has its own for others."""


def use_kernels(module: Any, device: torch.device) -> bool:
    """Let a layer's experts, transformers' module of them, be computed here from now on; False where they cannot be.

    Each row of a token is written once, and a token's weighted rows are read once: the same values as transformers', added up in float32
    in the order of the token's experts.
    """
    if not _fits(module) or not has_kernels(device):
        return False
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    module.m2ray_products = _has_products(module, device)
    module.config._experts_implementation = NAME  # noqa: SLF001 - has no public name
    return True


def _fits(module: Any) -> bool:
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return (
        implementation in (_TRANSFORMERS_OWN, NAME)
        and hasattr(module, "has_gate")  # of a class whose implementation can be chosen
        and not (module.has_bias or module.has_post_expert_norm)
        and all(weight.dtype == torch.bfloat16 for weight in module.parameters(recurse=False))
    )


def _has_products(module: Any, device: torch.device) -> bool:
    """Whether the experts are those whose products have kernels."""
    return is_silu_gated(module) and expert_products.fits(module.gate_up_proj, module.down_proj) and expert_products.has_kernels(device)


def is_silu_gated(module: Any) -> bool:
    """Whether experts are silu(gate) * up, with weights as most families lay them."""
    is_plain = module.has_gate and module.is_concatenated and not module.is_transposed
    return bool(is_plain) and type(module)._apply_gate is _default_apply_gate and type(module.act_fn) is type(ACT2FN["silu"])  # noqa: SLF001


def _forward(module: Any, hidden_NH: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """The steps of grouped_mm_experts_forward, of experts without biases; others of the same model, which share its choice, have that itself."""
    if not hasattr(module, "m2ray_products"):
        return grouped_mm_experts_forward(module, hidden_NH, chosen_NK, weights_NK)  # type: ignore[no-any-return]
    choice_R, places_NK, ends_E = sorted_choices(chosen_NK, module.num_experts)
    tokens_NH = hidden_NH.to(module.down_proj.dtype)
    if module.m2ray_products:
        tiles = expert_products.tiles(ends_E, choice_R.shape[0])
        inner_RI = expert_products.gated_rows(tokens_NH, choice_R, chosen_NK.shape[1], module.gate_up_proj, ends_E, tiles)
        rows_RH = expert_products.down_rows(inner_RI, module.down_proj, ends_E, tiles)
    else:
        rows_RH = _products(module, spread_rows(tokens_NH, places_NK), ends_E)
    sums_NH: torch.Tensor = sum_rows(rows_RH, places_NK, weights_NK)
    return sums_NH.to(hidden_NH.dtype)


def sorted_choices(chosen_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens' choices in the order of their experts: which choice each row is of [R], int64; where each choice went [N, K], int64; and behind each
    expert's last row [E], int32.
    """
    expert_R, choice_R = torch.sort(chosen_NK.reshape(-1).to(torch.int16), stable=True)
    experts_E = torch.arange(num_experts, device=expert_R.device, dtype=torch.int16)
    ends_E = torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
    place_R = torch.empty_like(choice_R)
    place_R[choice_R] = torch.arange(choice_R.shape[0], device=choice_R.device)
    return choice_R, place_R.view(chosen_NK.shape), ends_E


def _products(module: Any, rows_RH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The experts of their rows by torch's grouped product."""
    first, second = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    if not module.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    inner_RI = functional.grouped_mm(rows_RH, first, offs=ends_E)
    inner_RI = module._apply_gate(inner_RI) if module.has_gate else module.act_fn(inner_RI)  # noqa: SLF001 - families change it
    return functional.grouped_mm(inner_RI.to(second.dtype), second, offs=ends_E)


@torch.library.custom_op("m2ray::spread_rows", mutates_args=())
def spread_rows(tokens_NH: torch.Tensor, places_NK: torch.Tensor) -> torch.Tensor:
    """Each token's row at each of its places: [N * K, H]. The places are all of them, in any order, int64."""
    tokens_NH, places_NK = tokens_NH.contiguous(), places_NK.contiguous()
    rows_RH = tokens_NH.new_empty((places_NK.numel(), tokens_NH.shape[1]))
    if tokens_NH.is_cuda and len(tokens_NH):
        values, spread = (each.view(torch.bfloat16) if each.element_size() == 1 else each for each in (tokens_NH, rows_RH))
        _kernels().spread_rows[len(values),](values, places_NK, spread, *_sizes(values, places_NK))
    else:
        rows_RH[places_NK.reshape(-1)] = tokens_NH.repeat_interleave(places_NK.shape[1], dim=0)
    return rows_RH


@spread_rows.register_fake
def _(tokens_NH: torch.Tensor, places_NK: torch.Tensor) -> torch.Tensor:
    return tokens_NH.new_empty((places_NK.numel(), tokens_NH.shape[1]))


def _sizes(tokens_NH: torch.Tensor, places_NK: torch.Tensor) -> tuple[int, int, int]:
    width = tokens_NH.shape[1]
    return width, places_NK.shape[1], min(MOST_COLUMNS, 1 << (width - 1).bit_length())


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for this device that give the same bits as torch's steps."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and is_proved(device, "Experts are computed", _problem)
    )


def _problem(device: torch.device) -> str:
    """Of rows of more than one step across, the last one not whole."""
    generator = torch.Generator(device).manual_seed(0)
    tokens_NH = torch.randn((67, MOST_COLUMNS + 104), generator=generator, device=device).bfloat16()
    weights_NK = torch.rand((67, 6), generator=generator, device=device)
    places_NK = torch.randperm(weights_NK.numel(), generator=generator, device=device).view(weights_NK.shape)
    rows_RH = spread_rows(tokens_NH, places_NK)
    if not torch.equal(rows_RH[places_NK], tokens_NH[:, None].expand(-1, 6, -1)):
        return "its rows are not those of torch"
    rows_RH = torch.randn(rows_RH.shape, generator=generator, device=device).bfloat16()
    expected_NH = summed(rows_RH, places_NK, weights_NK)
    for parts_NH in ((tokens_NH, None), (tokens_NH, tokens_NH.flip(0))):
        stream_NH = sum(part.float() for part in parts_NH if part is not None)
        if not torch.equal(add_rows(*parts_NH, rows_RH, places_NK, weights_NK), (stream_NH + expected_NH).bfloat16()):
            return "its sums with a stream are not those of torch"
    return "" if torch.equal(sum_rows(rows_RH, places_NK, weights_NK), expected_NH) else "its sums are not those of torch"


@cache
def _kernels() -> Any:
    from m2ray.model import experts_kernel

    return experts_kernel
