"""Rows of a tensor, with the smallest and the largest value among them: by one kernel on a GPU, which reads them once."""

from functools import cache, partial
from typing import Any

import torch

from m2ray.model.kernel_proof import is_proved

_PROGRAMS = 1056
"""Of the kernel: eight for each of an H200's processors."""

_TILE = 2048
"""Values that a program takes at a time."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def take_rows(values_NW: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows at `places`, int64, a copy; and what `extremes_of` makes their smallest and largest value of, on their device."""
    device = values_NW.device
    if len(places) and values_NW.dtype in _FLOATS and values_NW.is_contiguous() and has_kernel(device, values_NW.dtype):
        return _taken(values_NW, places)
    rows_NW = values_NW.index_select(0, places)
    return rows_NW, extremes(rows_NW)


def extremes(rows_NW: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest value [2]; two zeros where there are none."""
    return torch.stack(torch.aminmax(rows_NW)) if rows_NW.numel() else rows_NW.new_zeros(2)


def extremes_of(found: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest value [2] from what `take_rows` or `extremes` found, on the host."""
    if found.dim() == 1:
        return found
    ordered = torch.stack([found[:, 0].amin(), found[:, 1].amax()])
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _taken(values_NW: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, width = len(places), values_NW.shape[1]
    columns = min(1024, 1 << (width - 1).bit_length())
    at_once = _TILE // columns
    programs = min(_PROGRAMS, -(-num_rows // at_once))
    rows_NW = values_NW.new_empty((num_rows, width))
    found = values_NW.new_empty((programs, 2), dtype=torch.int32)
    _kernel()[programs,](values_NW, places, rows_NW, found, num_rows, width, at_once, columns)
    return rows_NW, found


@cache
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this device, and it takes rows of such values bit for bit."""
    return is_proved(device, "Rows are captured", partial(_problem, dtype))


def _problem(dtype: torch.dtype, device: torch.device) -> str:
    """Of rows that take some programs two turns, and two across; the largest value comes in the first turn, the smallest in the last."""
    num_rows, width = 2 * _PROGRAMS + 5, 1300
    generator = torch.Generator(device).manual_seed(0)
    places = torch.randperm(num_rows + 99, generator=generator, device=device)[:num_rows]
    values_NW = torch.randn((num_rows + 99, width), generator=generator, device=device).to(dtype)
    values_NW[places[0], 0], values_NW[places[-1], -1] = 99.0, -99.0
    rows_NW, found = _taken(values_NW, places)
    expected_NW = values_NW.index_select(0, places)
    is_same = torch.equal(rows_NW, expected_NW) and torch.equal(extremes_of(found.cpu()), extremes(expected_NW).float().cpu())
    values_NW[places[0], 0] = torch.nan
    shows_nan = not extremes_of(_taken(values_NW, places)[1].cpu()).isfinite().all()
    return "" if is_same and shows_nan else f"its rows of {dtype} are not those of torch"


@cache
def _kernel() -> Any:
    from m2ray.model.rows_kernel import take_rows as kernel

    return kernel
