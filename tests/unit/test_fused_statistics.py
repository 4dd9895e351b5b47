"""The proof of the kernels of statistics, with torch in their place. The kernels themselves: tests/gpu."""

from collections.abc import Callable

import pytest
import torch

from m2ray.model import fused_statistics, statistics

CPU = torch.device("cpu")
Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def without_the_last_rows(rows_NW: torch.Tensor) -> Moments:
    """As kernels that leave out a piece that is not whole."""
    return statistics._moments(rows_NW[: len(rows_NW) // fused_statistics.PIECE * fused_statistics.PIECE])


def without_the_last_channels(rows_NW: torch.Tensor) -> Moments:
    whole = rows_NW.shape[1] // 128 * 128
    found_4W, centre_W, rest_W = statistics._moments(rows_NW)
    found_4W[:, whole:] = 0
    return found_4W, centre_W, rest_W


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_statistics, "moments", statistics._moments)
    monkeypatch.setattr(fused_statistics, "norms", statistics._norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_right_ones_are_taken(dtype: torch.dtype) -> None:
    assert not fused_statistics._problem(dtype, CPU)


@pytest.mark.parametrize("wrong", [without_the_last_rows, without_the_last_channels])
def test_wrong_moments_are_not(wrong: Callable[[torch.Tensor], Moments], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_statistics, "moments", wrong)
    assert "torch.bfloat16" in fused_statistics._problem(torch.bfloat16, CPU)


def test_nor_are_norms_of_some_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_statistics, "norms", lambda rows_NW: statistics._norms(rows_NW[:-1]))
    assert fused_statistics._problem(torch.float32, CPU)
