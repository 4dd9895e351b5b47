"""Statistics of rows on a GPU by kernels that read them three times in all, where torch's would be a hundred launches a layer."""

from functools import cache
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
def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for this device. Where there are none, torch's own serve."""
    return is_proved(device, "Statistics are taken", _problem)


def _problem(device: torch.device) -> str:
    rows_NW = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 6.0, 9.0, 12.0]], device=device)
    found_4W, _, _ = moments(rows_NW)
    expected = [[2.0, 4.0, 6.0, 8.0], [2.0, 8.0, 18.0, 32.0], [1.0, 2.0, 3.0, 4.0], [3.0, 6.0, 9.0, 12.0]]
    return "" if found_4W.tolist() == expected and norms(rows_NW).sum() == len(rows_NW) else "they are not those of numbers that are known"


@cache
def _kernels() -> ModuleType:
    from m2ray.model import statistics_kernel

    return statistics_kernel
