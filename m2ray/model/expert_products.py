"""The products of a mixture's experts on a GPU of Hopper's kind: by kernels that take tokens from where they are, and gate what they made."""

from functools import cache
from typing import Any

import torch
from torch.nn import functional

from m2ray.model.kernel_proof import is_proved

_CAPABILITY = 9
_ROWS, _DEPTH = 128, 64
"""Of a tile: rows of an expert, and what of them is multiplied at a time."""

_GATED_COLUMNS, _COLUMNS = 128, 256


def fits(weight_EOI: torch.Tensor, down_EIO: torch.Tensor) -> bool:
    """Whether the kernels can have experts of such weights: gate and up [E, 2 I, H], and down [E, H, I]."""
    _, hidden, inner = down_EIO.shape
    is_whole = hidden % _COLUMNS == 0 and inner % _GATED_COLUMNS == 0
    return is_whole and tuple(weight_EOI.shape[1:]) == (2 * inner, hidden) and weight_EOI.is_contiguous() and down_EIO.is_contiguous()


@torch.library.custom_op("m2ray::tiles", mutates_args=())
def tiles(ends_E: torch.Tensor, num_rows: int) -> torch.Tensor:
    """How the kernels go through experts' rows, int32 [tiles + 1, 4], from where each one's rows end."""
    number = len(ends_E)
    found = ends_E.new_empty((num_rows // _ROWS + number + 1, 4))
    if ends_E.is_cuda:
        _kernels().plan_tiles[1,](ends_E, found, number, 1 << (number - 1).bit_length(), _ROWS)
    return found


@tiles.register_fake
def _(ends_E: torch.Tensor, num_rows: int) -> torch.Tensor:
    return ends_E.new_empty((num_rows // _ROWS + ends_E.shape[0] + 1, 4))


@torch.library.custom_op("m2ray::gated_rows", mutates_args=())
def gated_rows(
    tokens_NH: torch.Tensor, choices_R: torch.Tensor, num_chosen: int, weights_EOH: torch.Tensor, ends_E: torch.Tensor, tiles: torch.Tensor
) -> torch.Tensor:
    """silu(gate) * up of each expert's tokens [R, I].

    Args:
        choices_R: tokens' choices in the order of the experts that were chosen: token * num_chosen + choice, int64.
        weights_EOH: gate and up one behind the other, O = 2 I.
        ends_E: behind each expert's last row, int32.
        tiles: of these ends.
    """
    rows_RI = tokens_NH.new_empty((len(choices_R), weights_EOH.shape[1] // 2))
    if not tokens_NH.is_cuda:
        return rows_RI.copy_(_gated(tokens_NH[choices_R // num_chosen], weights_EOH, ends_E))
    _multiply(tokens_NH.contiguous(), choices_R, None, weights_EOH, rows_RI, tiles, ends_E, num_chosen)
    return rows_RI


@gated_rows.register_fake
def _(
    tokens_NH: torch.Tensor, choices_R: torch.Tensor, _: int, weights_EOH: torch.Tensor, __: torch.Tensor, ___: torch.Tensor
) -> torch.Tensor:
    return tokens_NH.new_empty((choices_R.shape[0], weights_EOH.shape[1] // 2))


@torch.library.custom_op("m2ray::down_rows", mutates_args=())
def down_rows(inner_RI: torch.Tensor, weights_EHI: torch.Tensor, ends_E: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """The product of each expert's rows with its weight [R, H]."""
    if not inner_RI.is_cuda:
        return functional.grouped_mm(inner_RI, weights_EHI.transpose(1, 2), offs=ends_E)
    rows_RH = inner_RI.new_empty((len(inner_RI), weights_EHI.shape[1]))
    _multiply(None, None, inner_RI.contiguous(), weights_EHI, rows_RH, tiles, ends_E, 1)
    return rows_RH


@down_rows.register_fake
def _(inner_RI: torch.Tensor, weights_EHI: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    return inner_RI.new_empty((inner_RI.shape[0], weights_EHI.shape[1]))


def _gated(rows_RH: torch.Tensor, weights_EOH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    gate_RI, up_RI = functional.grouped_mm(rows_RH, weights_EOH.transpose(1, 2), offs=ends_E).float().chunk(2, dim=1)
    return functional.silu(gate_RI) * up_RI


def _multiply(
    tokens_NH: torch.Tensor | None,
    choices_R: torch.Tensor | None,
    inner_RI: torch.Tensor | None,
    weights_EOI: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    ends_E: torch.Tensor,
    num_chosen: int,
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    is_gated, (number, _, width) = inner_RI is None, weights_EOI.shape
    columns = _GATED_COLUMNS if is_gated else _COLUMNS
    blocks = (
        TensorDescriptor.from_tensor(weights_EOI.view(number, 2, -1, width), [1, 2, columns, _DEPTH])
        if is_gated
        else TensorDescriptor.from_tensor(weights_EOI.flatten(0, 1), [columns, _DEPTH])
    )
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    _kernels().multiply_rows[programs,](
        tokens_NH,
        choices_R,
        None if inner_RI is None else TensorDescriptor.from_tensor(inner_RI, [_ROWS, _DEPTH]),
        blocks,
        rows,
        tiles,
        ends_E,
        width,
        rows.shape[1],
        num_chosen,
        is_gated,
        _ROWS,
        columns,
        _DEPTH,
        not is_gated,
        num_warps=8,
        num_stages=4 if is_gated else 3,
    )


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for this device whose products have the bits of torch's, and whose gate is right within rounding."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _CAPABILITY
        and is_proved(device, "Experts are multiplied", _problem)
    )


def _problem(device: torch.device) -> str:
    """Of experts with no row, with one, with less than a tile and with several."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    ends_E = torch.tensor([0, 1, 300, 300, 428, 600], dtype=torch.int32, device=device)
    tokens_NH, weights_EOH, down_EHI = drawn(300, 512), drawn(6, 512, 512) / 16, drawn(6, 512, 256)
    choices_R = torch.randperm(600, generator=generator, device=device)
    plan = tiles(ends_E, 600)
    inner_RI = gated_rows(tokens_NH, choices_R, 2, weights_EOH, ends_E, plan)
    expected_RI = _gated(tokens_NH[choices_R // 2], weights_EOH, ends_E)
    if not ((inner_RI - expected_RI).abs() <= expected_RI.abs() / 128).all():  # what is no number is not within
        return "what is gated is not as torch's"
    expected_RH = functional.grouped_mm(inner_RI, down_EHI.transpose(1, 2), offs=ends_E)
    return "" if torch.equal(down_rows(inner_RI, down_EHI, ends_E, plan), expected_RH) else "its bits are not those of torch's grouped_mm"


@cache
def _kernels() -> Any:
    from m2ray.model import products_kernel

    return products_kernel
