"""Statistics of rows on a GPU by kernels that read them three times in all, where torch's would be a hundred launches a layer."""

from functools import cache, partial
from types import ModuleType

import torch

from m2ray.model.kernel_proof import is_proved
from m2ray.statistics import NORM_BINS, NORM_SHIFT

PIECE = 256
"""Rows that are added up in float32."""

_TILE = {"ROWS": 16, "COLUMNS": 128}
_NORMS_TILE = {"ROWS": 4, "COLUMNS": 1024}


def moments(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As those of m2ray.model.statistics, of at least one row; sums in another order."""
    rows_NW = rows_NW.contiguous()
    num_rows, width = rows_NW.shape
    pieces, across = -(-num_rows // PIECE), -(-width // _TILE["COLUMNS"])
    found_4W, rest_W = rows_NW.new_empty((4, width), dtype=torch.float64), rows_NW.new_empty(width, dtype=torch.float64)
    centre_W = rows_NW.new_empty(width, dtype=torch.float32)
    some_3PW = rows_NW.new_empty((3, pieces, width), dtype=torch.float32)
    kernels = _kernels()
    kernels.piece_sums[across, pieces](rows_NW, *some_3PW, num_rows, width, PIECE, **_TILE)
    kernels.centre_of[across,](rows_NW, *some_3PW, found_4W, centre_W, num_rows, pieces, width, **_TILE)
    kernels.piece_deviations[across, pieces](rows_NW, centre_W, *some_3PW[:2], num_rows, width, PIECE, **_TILE)
    kernels.moments_of[across,](centre_W, *some_3PW[:2], found_4W, rest_W, num_rows, pieces, width, **_TILE)
    return found_4W, centre_W, rest_W


def norms(rows_NW: torch.Tensor) -> torch.Tensor:
    """How many rows' norms fall into each bin, int32 [NORM_BINS]."""
    rows_NW = rows_NW.contiguous()
    num_rows, width = rows_NW.shape
    counts = rows_NW.new_zeros(NORM_BINS, dtype=torch.int32)
    if num_rows:
        _kernels().count_norms[-(-num_rows // _NORMS_TILE["ROWS"]),](rows_NW, counts, num_rows, width, **_NORMS_TILE, SHIFT=NORM_SHIFT)
    return counts


@cache
def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for this device that give of rows of this dtype what float64 gives. Where there are none, torch's own serve."""
    return is_proved(device, "Statistics are taken", partial(_problem, dtype))


def _problem(dtype: torch.dtype, device: torch.device) -> str:
    """Of rows that take every loop of the kernels several turns, the last one not whole."""
    long_NW = _rows(_TILE["ROWS"] * PIECE + 100, 2 * _TILE["COLUMNS"] + 44, dtype, device)
    wide_NW = _rows(10 * _NORMS_TILE["ROWS"] + 3, _NORMS_TILE["COLUMNS"] + 100, dtype, device)
    are_right = _has_moments(long_NW) and torch.equal(norms(wide_NW), _exact_norms(wide_NW))
    return "" if are_right else f"those of rows of {dtype} are not float64's"


def _rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Channels of different means, one of which never changes."""
    rows_NW = torch.randn((num_rows, width), generator=torch.Generator(device).manual_seed(0), device=device)
    rows_NW[:, 5] = 0.1
    return (rows_NW + torch.arange(width, device=device)).to(dtype)


def _has_moments(rows_NW: torch.Tensor) -> bool:
    """Whether the kernels' moments are those of float64, within what sums in another order may be off."""
    (mean_W, squares_W, *ends), centre_W, rest_W = moments(rows_NW)
    exact_NW = rows_NW.double()
    exact_W = exact_NW.mean(dim=0)
    exact_squares_W = (exact_NW - exact_W).square().sum(dim=0)
    most_W = 1e-6 * exact_NW.abs().mean(dim=0)
    return (
        bool(((mean_W - exact_W).abs() <= most_W).all())
        and bool(((centre_W + rest_W - exact_W).abs() <= most_W).all())
        and bool(((squares_W - exact_squares_W).abs() <= 1e-6 * exact_squares_W + 1e-18 * exact_W.square()).all())
        and torch.equal(torch.stack(ends), torch.stack(torch.aminmax(exact_NW, dim=0)))
    )


def _exact_norms(rows_NW: torch.Tensor) -> torch.Tensor:
    bins_N = torch.linalg.vector_norm(rows_NW, dim=1, dtype=torch.float64).float().view(torch.int32) >> NORM_SHIFT
    return torch.bincount(bins_N, minlength=NORM_BINS).int()


@cache
def _kernels() -> ModuleType:
    from m2ray.model import statistics_kernel

    return statistics_kernel
