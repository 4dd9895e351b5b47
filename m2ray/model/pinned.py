"""Pinned host memory for captured rows, in runs of one size, so that each is found again among those that there are."""

import errno
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from math import prod
from typing import Protocol

import numpy as np
import torch

from m2ray.errors import StageError
from m2ray.model.registered import register, unregister
from m2ray.shared_memory import SharedMemory, Slab

_ALIGNMENT = 64

_GROWN_BYTES = 32 << 20
"""Of runs that nobody has reserved, so many at once: a slab, and with it a descriptor of the stage's, for so many bytes or one longer run. What is
reserved is one slab."""


class RunMemory(Protocol):
    """Where runs come from. One thread calls."""

    def reserve(self, sizes: Sequence[int], run_rows: int) -> None:
        """Have runs of so many bytes, and none of jobs that took others, or whose runs had not so many rows.

        Raises:
            RuntimeError, OSError: the system does not give so much.
        """

    def take(self, num_bytes: int) -> torch.Tensor:
        """A run, uint8, for as long as anything refers to its memory. Raises as `reserve`."""


class PinnedByTorch:
    """Memory that torch pins, and keeps by powers of two of its size."""

    def reserve(self, sizes: Sequence[int], _run_rows: int) -> None:
        _ = [self.take(num_bytes) for num_bytes in sizes]

    def take(self, num_bytes: int) -> torch.Tensor:
        return _pinned(num_bytes)


class _Run:
    """A piece of a slab. Whoever has it refers to the array that was made of it; so it is free again once that is gone, and nobody has to say so."""

    def __init__(self, slab: Slab, offset: int, num_bytes: int) -> None:
        self._slab, self._offset, self._num_bytes = slab, offset, num_bytes
        self._lent: weakref.ref[np.ndarray] | None = None

    def lend(self) -> torch.Tensor | None:
        """Its memory; None while somebody has it."""
        if self._lent is not None and self._lent() is not None:
            return None
        lent = np.frombuffer(self._slab.memory, np.uint8, self._num_bytes, self._offset)
        self._lent = weakref.ref(lent)
        return torch.from_numpy(lent)


class SharedRuns:
    """Runs in memory that another process maps too, and that is registered with CUDA for a GPU."""

    def __init__(self, memory: SharedMemory, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._reserved: tuple[int, list[int]] | None = None
        self._slabs: list[Slab] = []
        self._runs: defaultdict[int, deque[_Run]] = defaultdict(deque)

    def reserve(self, sizes: Sequence[int], run_rows: int) -> None:
        wanted = run_rows, sorted(map(_aligned, sizes))
        if wanted != self._reserved:
            self.close()
            self._add(wanted[1])
            self._reserved = wanted

    def take(self, num_bytes: int) -> torch.Tensor:
        size = _aligned(num_bytes)
        runs = self._runs[size]
        for _ in range(len(runs)):
            runs.rotate(-1)  # the one that was lent first is the next to come back
            lent = runs[-1].lend()
            if lent is not None:
                return lent
        self._add([size] * max(1, _GROWN_BYTES // size))
        lent = runs[-1].lend()
        assert lent is not None, "nobody had it yet"
        return lent

    def close(self) -> None:
        """Let go of all runs: of one that somebody has the memory stays, but is pinned no more."""
        if self._slabs and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for slab in self._slabs:
            if self._device.type == "cuda":
                unregister(slab.address)
            self._memory.remove(slab)
        self._slabs.clear()
        self._runs.clear()
        self._reserved = None

    def _add(self, sizes: Sequence[int]) -> None:
        if not sizes:
            return
        slab = self._memory.add(sum(sizes))
        self._register(slab)
        self._slabs.append(slab)
        offset = 0
        for size in sizes:
            self._runs[size].append(_Run(slab, offset, size))
            offset += size

    def _register(self, slab: Slab) -> None:
        if self._device.type != "cuda":
            return
        error = register(slab.address, len(slab.memory), self._device)
        if error:
            self._memory.remove(slab)
            raise RuntimeError(f"CUDA error {error}")


class PinnedRuns:
    """Rows on the host, a part after the other. Each part's rows lie in one piece; those of small micro-batches share runs. One thread calls.

    Memory of sizes that come once takes the system long, and the computation waits for it: with
    16 layers a stage, all captured, the last and small micro-batches of shards, which found none of their sizes, took half of the time. So
    every run is as long as a full micro-batch's rows, and what one micro-batch leaves of it the next one takes. A single longer sequence's rows have a run of
    two, four, eight times that, so that other long ones find it again.
    """

    def __init__(self, run_rows: int = 0, memory: RunMemory | None = None) -> None:
        """Args:
        run_rows: of a run, the tokens of a full micro-batch. 0: each part's rows are a run.
        memory: where runs come from; None for torch.
        """
        self._run_rows = run_rows
        self._memory = memory or PinnedByTorch()
        self._left: dict[int, torch.Tensor] = {}
        """By the bytes of a row, what is left of the last run."""

    def reserve(self, num_bytes: int, rows_bytes: Sequence[int]) -> None:
        """Take memory for so many bytes of rows, and leave it where runs come from: that takes long, and the computation would have to wait for it.

        Args:
            rows_bytes: of a row of each column of each part, whose runs are had in turn.

        Raises:
            StageError: the system does not give so much.
        """
        sizes: list[int] = []
        while num_bytes > 0:
            sizes.append(self._run_rows * rows_bytes[len(sizes) % len(rows_bytes)])
            num_bytes -= sizes[-1]
        try:
            self._memory.reserve(sizes, self._run_rows)
        except (RuntimeError, OSError) as error:
            raise _refused(sum(sizes), error) from error

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for one part's rows: the run that it lies in stays as long as any of them does. Raises as `reserve`."""
        row_bytes = prod(shape[1:]) * dtype.itemsize
        exact_bytes = shape[0] * row_bytes
        num_bytes = _aligned(exact_bytes)
        left = self._left.pop(row_bytes, None)
        if left is None or len(left) < num_bytes:
            run_bytes = _fitting(num_bytes, _aligned(self._run_rows * row_bytes))
            try:
                left = self._memory.take(run_bytes)
            except (RuntimeError, OSError) as error:
                raise _refused(run_bytes, error) from error
        if len(left) > num_bytes:  # what is used up is nobody's to keep
            self._left[row_bytes] = left[num_bytes:]
        return left[:exact_bytes].view(dtype).view(shape)


def _refused(num_bytes: int, error: Exception) -> StageError:
    what = f"{num_bytes:,} bytes of pinned host memory for captured rows cannot be had: {str(error).splitlines()[0].rstrip('.')}."
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        advice = (
            f"Allow the process more open files (ulimit -n): it has one for each {_GROWN_BYTES >> 20} MiB of such memory, or longer run."
        )
    else:
        advice = "Allow the process to lock more memory (ulimit -l), or begin another run with lower batch_tokens or fewer layers."
    return StageError(what, advice)


def _fitting(num_bytes: int, run_bytes: int) -> int:
    """Bytes of a run for so many: as many as there are where runs have no size of their own."""
    if not run_bytes:
        return num_bytes
    num_runs = max(1, -(-num_bytes // run_bytes))
    return run_bytes << (num_runs - 1).bit_length()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
