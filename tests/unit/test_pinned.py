"""Pinned memory: how many runs of which sizes captured rows take, and that memory of offloaded layers is registered no longer than it is there."""

import gc
from types import SimpleNamespace

import pytest
import torch

from m2ray.model import pinned
from m2ray.model.pinned import PinnedRuns
from m2ray.model.residency.places import InHostMemory, host_memory

FULL, WIDTH, PARTS = 1024, 64, 16
RUN_BYTES = FULL * WIDTH * 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the runs that are asked for."""
    found: list[int] = []

    def unpinned(num_bytes: int) -> torch.Tensor:
        found.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(pinned, "_pinned", unpinned)
    return found


def takes(runs: PinnedRuns, tokens: int, width: int = WIDTH) -> list[torch.Tensor]:
    """Each part's memory for the rows of one micro-batch."""
    return [runs.take((tokens, width), torch.bfloat16) for _ in range(PARTS)]


def test_a_full_micro_batch_has_a_run_a_part(asked: list[int]) -> None:
    takes(PinnedRuns(FULL), FULL)
    assert asked == [RUN_BYTES] * PARTS


@pytest.mark.parametrize("tokens", [FULL // 2, 300, 33, 1])
def test_parts_of_a_small_micro_batch_share_runs_and_no_byte(tokens: int, asked: list[int]) -> None:
    rows = takes(PinnedRuns(FULL), tokens)
    assert sum(asked) <= 2 * PARTS * tokens * WIDTH * 2 + RUN_BYTES
    for number, part in enumerate(rows):
        assert part.shape == (tokens, WIDTH)
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(rows))


def test_micro_batches_of_any_size_ask_for_runs_of_one_size_and_take_what_others_left(asked: list[int]) -> None:
    """Another size is one that torch does not have: the computation would wait for the system, once a micro-batch."""
    runs = PinnedRuns(FULL)
    held = [part for tokens in (FULL, 700, 600, 513, 400, 9, 1, 77) for part in takes(runs, tokens)]
    assert set(asked) == {RUN_BYTES}
    few, before = PinnedRuns(FULL), len(asked)
    for _ in range(10):
        held += takes(few, 1)
    assert len(asked) - before == -(-10 * PARTS * WIDTH * 2 // RUN_BYTES), "160 rows fit in one run"


def test_rows_of_other_widths_have_runs_of_their_own(asked: list[int]) -> None:
    runs = PinnedRuns(FULL)
    for _ in range(PARTS):
        wide, narrow = runs.take((300, WIDTH), torch.bfloat16), runs.take((300, 8), torch.int16)
        assert wide.data_ptr() + wide.nbytes <= narrow.data_ptr() or narrow.data_ptr() + narrow.nbytes <= wide.data_ptr()
    assert set(asked) == {RUN_BYTES, FULL * 8 * 2}


def test_rows_beyond_a_run_have_one_of_their_own(asked: list[int]) -> None:
    takes(PinnedRuns(FULL), 2 * FULL)
    assert asked == [2 * RUN_BYTES] * PARTS


def test_a_layers_memory_is_registered_as_long_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: set[int] = set()
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, *_: registered.add(address) or 0,
        cudaHostUnregister=lambda address: registered.remove(address) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    waited_for: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    place = InHostMemory(host_memory(5000), torch.device("cuda:1"))
    place.settle()
    assert registered == {place.run.data_ptr()}
    del place
    gc.collect()
    assert not registered
    assert waited_for == [torch.device("cuda:1")], "whichever thread lets go of it, and whichever GPU is that one's own"
