"""Pinned memory: how many runs of which sizes captured rows take, and that memory of offloaded layers is registered no longer than it is there."""

import gc
from types import SimpleNamespace

import pytest
import torch

from m2ray.model import pinned
from m2ray.model.pinned import PinnedRuns
from m2ray.model.residency.places import InHostMemory

FULL, WIDTH, PARTS = 1024, 64, 16


def takes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], list[int]]:
    """Each part's memory, and the bytes of the runs that were asked for."""
    asked: list[int] = []

    def unpinned(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(pinned, "_pinned", unpinned)
    runs = PinnedRuns(FULL)
    return [runs.take((tokens, WIDTH), torch.bfloat16, PARTS - number) for number in range(PARTS)], asked


def test_a_full_micro_batch_has_a_run_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = takes(FULL, monkeypatch)
    assert asked == [FULL * WIDTH * 2] * PARTS


@pytest.mark.parametrize("tokens", [FULL // 2, 300, 33, 1])
def test_parts_of_a_small_micro_batch_share_runs_and_no_byte(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked = takes(tokens, monkeypatch)
    assert sum(asked) <= 2 * PARTS * tokens * WIDTH * 2
    assert len(set(asked[:-1])) <= 1, "all but the last are as long as a full one's"
    for number, part in enumerate(rows):
        assert part.shape == (tokens, WIDTH)
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(rows))


def test_rows_of_other_widths_have_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = takes(0, monkeypatch)
    runs = PinnedRuns(FULL)
    for left in range(PARTS, 0, -1):
        wide, narrow = runs.take((300, WIDTH), torch.bfloat16, left), runs.take((300, 8), torch.int16, left)
        assert wide.data_ptr() + wide.nbytes <= narrow.data_ptr() or narrow.data_ptr() + narrow.nbytes <= wide.data_ptr()
    assert sum(asked) <= 2 * PARTS * 300 * (WIDTH + 8) * 2


def test_rows_beyond_a_run_have_one_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = takes(2 * FULL, monkeypatch)
    assert asked == [2 * FULL * WIDTH * 2] * PARTS


def test_a_layers_memory_is_registered_as_long_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: set[int] = set()
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, *_: registered.add(address) or 0,
        cudaHostUnregister=lambda address: registered.remove(address) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    waited_for: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    place = InHostMemory(5000, torch.device("cuda:1"))
    place.settle()
    assert registered == {place.run.data_ptr()}
    del place
    gc.collect()
    assert not registered
    assert waited_for == [torch.device("cuda:1")], "whichever thread lets go of it, and whichever GPU is that one's own"
