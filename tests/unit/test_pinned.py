"""Pinned memory: how many runs of which sizes captured rows take, when they are free again, and that memory is registered no longer than it is there."""

import errno
import gc
import os
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from m2ray.errors import StageError
from m2ray.model import pinned
from m2ray.model.pinned import PinnedRuns, SharedRuns
from m2ray.model.residency.places import InHostMemory, host_memory
from m2ray.planning import memory as planned
from m2ray.planning.memory import Workload
from m2ray.shared_memory import SharedMemory

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


def test_sequences_longer_than_a_micro_batch_find_each_others_runs_again() -> None:
    memory = SharedMemory()
    runs = PinnedRuns(FULL, SharedRuns(memory, torch.device("cpu")))
    runs.reserve(PARTS * RUN_BYTES, [WIDTH * 2])
    for num_rows in range(FULL + 1, 4 * FULL, FULL // 50):
        takes(runs, num_rows)
    assert len(memory.slabs) <= 3, "those reserved, and of two and of four runs"
    odd = SharedRuns(SharedMemory(), torch.device("cpu"))
    PinnedRuns(1001, odd).take((1001, 1), torch.int32)
    assert set(odd._runs) == {4032}, "no run is twice as long for being aligned"


@pytest.mark.parametrize("longest", [FULL, 4 * FULL])
def test_runs_take_no_more_than_the_plan_counts(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Rows of any length wait until the writer's queue is full, while those of two more micro-batches are on their way."""
    for module, name in ((pinned, "_GROWN_BYTES"), (planned, "GROWN_BYTES")):
        monkeypatch.setattr(module, name, 1 << 14)
    columns, queue_bytes, memory = [3 * WIDTH, 4, WIDTH, 4], 12 * FULL * WIDTH, SharedMemory()
    runs = PinnedRuns(FULL, SharedRuns(memory, torch.device("cpu")))
    runs.reserve(2 * FULL * sum(columns) + queue_bytes, columns)
    for tokens in range(FULL // 2 + 1, longest + 1, FULL // 16):
        held: deque[list[torch.Tensor]] = deque()
        for _ in range(30):
            while (len(held) - 1) * tokens * sum(columns) > queue_bytes:
                held.popleft()
            held.append([runs.take((tokens, width), torch.uint8) for width in columns])
    taken_bytes = sum(len(slab.memory) for slab in memory.slabs)
    work = Workload(FULL, longest, longest, 1, 2, 0, writer_queue_bytes=queue_bytes)
    assert taken_bytes <= planned.gpu_host_memory(work, columns).running["capture"] <= 1.5 * taken_bytes


def addresses(rows: list[torch.Tensor]) -> list[int]:
    return [part.data_ptr() for part in rows]


def test_a_run_is_free_again_when_nothing_refers_to_it_and_none_is_had_twice() -> None:
    memory = SharedMemory()
    runs = PinnedRuns(FULL, SharedRuns(memory, torch.device("cpu")))
    runs.reserve(2 * PARTS * RUN_BYTES, [WIDTH * 2])
    first, second = takes(runs, FULL), takes(runs, FULL)
    kept = first[3][5:7].view(torch.uint8).numpy()
    kept[:] = 7
    lay = addresses(first)
    first = takes(runs, FULL)
    assert len(memory.slabs) == 2, "none was free"
    del first
    again = takes(runs, FULL)
    for part in (*again, *second):
        part.zero_()
    assert (kept == 7).all(), "a few of a run's rows are all that somebody still reads"
    assert lay[3] not in addresses(again)
    assert len(memory.slabs) == 2


def test_memory_is_registered_while_a_job_may_take_it_and_kept_for_another_that_takes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}
    errors = [0]
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, num_bytes, _: errors[0] or registered.update({address: num_bytes}) or 0,
        cudaHostUnregister=lambda address: registered.pop(address) and 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    waited_for: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    launched: list[torch.device] = []

    def launch(_: int, device: torch.device) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error 2, of a call before")

    monkeypatch.setattr(torch, "ones", launch)
    memory = SharedMemory()
    runs = SharedRuns(memory, torch.device("cuda:1"))
    PinnedRuns(FULL, runs).reserve(4 * RUN_BYTES, [WIDTH * 2])
    (slab,) = memory.slabs
    assert registered == {slab.address: 4 * RUN_BYTES}
    held = takes(PinnedRuns(FULL, runs), FULL // PARTS)[0].fill_(7)
    assert memory.slabs == (slab,)
    PinnedRuns(FULL, runs).reserve(4 * RUN_BYTES, [WIDTH * 2])
    assert memory.slabs == (slab,)
    PinnedRuns(2 * FULL, runs).reserve(4 * RUN_BYTES, [WIDTH * 2])
    assert slab not in memory.slabs
    assert registered == {memory.slabs[0].address: 4 * RUN_BYTES}
    assert (held == 7).all(), "whoever has rows of the job before still reads them"
    PinnedRuns(FULL, runs).reserve(0, [])
    assert not registered, "chosen tokens have no use for it"
    few = takes(PinnedRuns(FULL, runs), 1)
    PinnedRuns(FULL, runs).reserve(0, [])
    assert len(registered) == len(memory.slabs) == 1, "a job like the one before pins nothing"
    PinnedRuns(3 * FULL, runs).reserve(0, [])
    assert not registered, "a job of longer runs has no use for it either"
    del few
    errors[0] = 2
    with pytest.raises(StageError, match=f"{8 * RUN_BYTES:,} bytes of pinned host memory for captured rows cannot be had: CUDA error 2"):
        PinnedRuns(FULL, runs).reserve(8 * RUN_BYTES, [WIDTH * 2])
    with pytest.raises(StageError, match=r"bytes of pinned host memory for captured rows cannot be had: CUDA error 2\."):
        takes(PinnedRuns(FULL, runs), FULL)
    assert not registered
    assert memory.slabs == ()
    assert set(waited_for) == {torch.device("cuda:1")}
    assert launched == 2 * [torch.device("cuda:1")], "no kernel of the run is told of what was refused"


def test_memory_for_which_files_are_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(StageError, match=r"Too many open files\. Allow the process more open files \(ulimit -n\): .* 32 MiB"):
        takes(PinnedRuns(FULL, SharedRuns(SharedMemory(), torch.device("cpu"))), FULL)


def test_a_layers_memory_is_registered_as_long_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: set[int] = set()
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, *_: registered.add(address) or 0,
        cudaHostUnregister=lambda address: registered.remove(address) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    waited_for: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    place = InHostMemory(host_memory(5000), torch.device("cuda:1"))
    place.settle()
    assert registered == {place.run.data_ptr()}
    del place
    gc.collect()
    assert not registered
    assert waited_for == [torch.device("cuda:1")], "whichever thread lets go of it, and whichever GPU is that one's own"
