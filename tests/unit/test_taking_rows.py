"""Rows and their extremes, with torch in the place of the kernel, which is held against torch on the GPU itself (tests/gpu)."""

from typing import Any

import pytest
import torch

from m2ray.model import taking_rows
from m2ray.model.taking_rows import extremes_of, take_rows

NO_NUMBER = float("nan")


class HostKernel:
    """Each program takes every so many rows, and writes their extremes as numbers that are in the order of the values."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *given: self.run(grid[0], *given)

    def run(
        self, programs: int, values: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, found: torch.Tensor, num_rows: int, width: int,
        at_once: int, columns: int,
    ) -> None:  # fmt: skip
        assert rows.shape == (num_rows, width)
        assert at_once * columns == taking_rows._TILE
        rows.copy_(values[places])
        bits = rows.float().view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        blocks = ordered.split(at_once)
        for program in range(programs):
            found[program] = torch.stack(torch.aminmax(torch.cat(blocks[program::programs])))


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking_rows, "_kernel", HostKernel)
    monkeypatch.setattr(taking_rows, "has_kernel", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernel_is_held_against_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not taking_rows._problem(dtype, torch.device("cpu"))

    class Swapped(HostKernel):
        def run(self, programs: int, *given: Any) -> None:
            super().run(programs, given[0], given[1].flip(0), *given[2:])

    class OneTurn(HostKernel):
        """Forgets what came before its last turn."""

        def run(self, programs: int, *given: Any) -> None:
            super().run(programs, *given)
            given[3][0] = given[3][1]

    class NoNan(HostKernel):
        def run(self, programs: int, values: torch.Tensor, *given: Any) -> None:
            super().run(programs, values.nan_to_num(), *given)
            given[1].copy_(values[given[0]])

    for wrong in (Swapped, OneTurn, NoNan):
        monkeypatch.setattr(taking_rows, "_kernel", wrong)
        assert str(dtype) in taking_rows._problem(dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-3.0, 0.5, 2.0], (-3.0, 2.0)),
        ([-5.0, -0.25], (-5.0, -0.25)),
        ([0.0, -0.0], (-0.0, 0.0)),
        ([1.0, float("-inf")], (float("-inf"), 1.0)),
        ([1.0, NO_NUMBER], (1.0, NO_NUMBER)),
        ([1.0, -NO_NUMBER], (-NO_NUMBER, 1.0)),
    ],
)
def test_extremes_are_in_the_order_of_values_and_show_what_is_no_number(values: list[float], expected: tuple[float, float]) -> None:
    rows, found = take_rows(torch.tensor(values)[:, None], torch.arange(len(values)))
    assert torch.equal(rows[:, 0].nan_to_num(), torch.tensor(values).nan_to_num())
    assert torch.equal(extremes_of(found).nan_to_num(), torch.tensor(expected).nan_to_num())


def test_ids_and_no_rows_at_all_are_left_to_torch() -> None:
    ids = torch.tensor([[4, 7], [9, 1]], dtype=torch.int16)
    rows, found = take_rows(ids, torch.tensor([1]))
    assert (rows.tolist(), extremes_of(found).tolist()) == ([[9, 1]], [1, 9])
    rows, found = take_rows(torch.ones(3, 2), torch.zeros(0, dtype=torch.int64))
    assert (rows.shape, extremes_of(found).tolist()) == ((0, 2), [0, 0])
