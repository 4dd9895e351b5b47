"""Loading at the disk's speed: long reads into pinned memory, one copy to the GPU, hashed there and unpacked by a fused kernel.

Checkpoint tensors that lie side by side in a file are read as one extent. Each lane owns a pinned buffer, a buffer on the GPU
and a stream, so that reading, copying and converting of different extents overlap; host memory holds an extent a lane and no more.
Python does little for an extent and next to nothing for a tensor: sixteen threads share one interpreter with the planning.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch

from m2ray.model.checkpoint import Checkpoint
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import EXTENT_BYTES, Extent, Range, RowsToLoad, apart_extents, value_extents
from m2ray.model.gpu_hashes import GpuHashes, can_hash, fits
from m2ray.model.quantization.fused import KernelTable, check_of, is_for_kernel
from m2ray.model.quantization.fused_proof import is_exact

LANES = min(16, 2 * (os.cpu_count() or 8))
"""One thread copies some 2 GB/s out of the page cache; the GPU takes 50."""

_ALIGNMENT = 16
_APART_READERS = 4
_COMPILE_S = 600.0
"""What Triton may take to compile the kernel on a busy node."""

APART_BYTES = 64 * 2**20
"""Of parts that lie apart from their values, which are an eighth of 4-bit ones, read at one time, where no tensor has more."""

_APART_AHEAD = 3
"""How many times so much is on the GPU at most, beside that which is being read."""

Fill = Callable[[RowsToLoad, Mapping[str, torch.Tensor]], None]
"""Unpacks parts that are on the GPU, and writes them where they are wanted."""


class Convert(Protocol):
    """Makes weights of an extent's bytes on the GPU, uint8. `read`: the same bytes in the lane's pinned memory, if they are there as a whole."""

    def __call__(self, data: torch.Tensor, read: torch.Tensor | None, *, by_kernel: bool) -> None: ...


class _Lane:
    """One reader's buffers and stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event(blocking=True)  # whoever waits leaves its core to those that read
        with torch.cuda.device(device):
            self._pinned = torch.empty(EXTENT_BYTES, dtype=torch.uint8, pin_memory=True)
            # On the default stream, where it can be used again once the weights are loaded.
            self._on_gpu = torch.empty(EXTENT_BYTES + _ALIGNMENT, dtype=torch.uint8, device=device)
            torch.cuda.current_stream().synchronize()
        self._memory = self._pinned.numpy().data

    def read(self, checkpoint: Checkpoint, extent: Extent[RowsToLoad], take: Callable[[int, memoryview], None]) -> torch.Tensor:
        """Read the extent and begin to copy it to the GPU, on this lane's stream, which has to be the current one.

        Meanwhile `take` is given what was read, with its offset in the file.
        """
        begin, stop = _lead(extent), _lead(extent) + extent.stop - extent.start
        if stop > len(self._on_gpu):
            self.stream.synchronize()
            self._on_gpu = torch.empty(stop, dtype=torch.uint8, device=self._on_gpu.device)
        for done in range(begin, stop, EXTENT_BYTES):
            num_bytes = min(EXTENT_BYTES, stop - done)
            self._copied.synchronize()
            checkpoint.read_extent(extent.file, extent.start + done - begin, self._memory[:num_bytes])
            self._on_gpu[done : done + num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
            self._copied.record(self.stream)
            take(extent.start + done - begin, self._memory[:num_bytes])
        return self._on_gpu

    def held(self, extent: Extent[RowsToLoad]) -> torch.Tensor | None:
        """The extent that was read last, in pinned memory; None if it is longer than that."""
        num_bytes = extent.stop - extent.start
        return self._pinned[:num_bytes] if num_bytes <= len(self._pinned) else None


class _Conversions:
    """How what one call of `Lanes.begin` reads becomes weights: by the fused kernel's table, or by `fill`."""

    def __init__(self, device: torch.device, apart: Mapping[Range, torch.Tensor], fill: Fill) -> None:
        self._device = device
        self._apart = apart
        self._fill = fill
        self._table = KernelTable()

    def add(self, extent: Extent[RowsToLoad]) -> Convert:
        """A function that converts an extent once it lies in a lane's buffer on the GPU."""
        first, base = len(self._table), extent.start - _lead(extent)
        by_table, others = [], []
        for wanted in extent.items:
            if is_for_kernel(wanted, self._device):
                by_table.append(wanted)
                self._table.add(wanted, {name: self._place(part, base) for name, part in wanted.parts.items()})
            else:
                others.append(wanted)
        lines = slice(first, len(self._table))
        checks = [(wanted, check) for wanted in by_table if (check := check_of(wanted))]

        def parts_of(wanted: RowsToLoad, data: torch.Tensor, offset: int) -> dict[str, torch.Tensor]:
            return {name: self._apart[part] if part in self._apart else part.of(data, offset) for name, part in wanted.parts.items()}

        def convert(data: torch.Tensor, read: torch.Tensor | None, *, by_kernel: bool) -> None:
            if by_kernel and by_table:
                # A look at what lies on the GPU waits for all that was asked of it, once a matrix.
                looked_at = (data, base) if read is None else (read, extent.start)
                for wanted, check in checks:
                    check(parts_of(wanted, *looked_at))
                self._table.run(data, lines)
            for wanted in others if by_kernel else extent.items:
                self._fill(wanted, parts_of(wanted, data, base))

        return convert

    def _place(self, part: Range, base: int) -> int:
        """Where a part lies, as the kernel's table has it."""
        return -self._apart[part].data_ptr() if part in self._apart else part.offset - base

    def settle(self) -> None:
        """Copy the table to the GPU."""
        if len(self._table):
            self._table.to(self._device)


class _Hashed(NamedTuple):
    """How an extent is hashed: `here` takes bytes that were read, and their offset in the file; `there` the lane's buffer on the GPU."""

    here: Callable[[int, memoryview], None]
    there: Callable[[torch.Tensor], None]


class _Hashing:
    """How what one call of `Lanes.begin` reads is hashed: by the GPU, if it can be, and the rest by the lanes."""

    def __init__(self, device: torch.device, digests: WeightDigests, *, on_gpu: bool) -> None:
        self._digests = digests
        self._on_gpu = on_gpu
        self._hashes = GpuHashes(device)

    def add(self, extent: Extent[RowsToLoad]) -> _Hashed:
        pieces = [piece for wanted in extent.items for piece in wanted.in_one_run]
        there = [piece for piece in pieces if fits(piece)] if self._on_gpu else []
        here = [piece for piece in pieces if not fits(piece)] if self._on_gpu else pieces
        numbers = self._hashes.add(there, extent.start - _lead(extent))
        return _Hashed(partial(self._digests.add, here), lambda data: self._hashes.begin(data, numbers))

    def settle(self) -> None:
        """Copy what the kernel has to know to the GPU."""
        self._hashes.settle()

    def finish(self) -> None:
        """Take the digests from the GPU, once it is done."""
        self._hashes.finish(self._digests)


class Lanes:
    """Readers that fill a GPU's memory. They are made in the background: pinning memory takes as long as planning what to read.

    Use as a context: leaving it ends the readers. One thread calls; `fill` runs on several, each within its own stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: SimpleQueue[_Lane] = SimpleQueue()
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="load")
        self._made = [self._pool.submit(lambda: self._free.put(_Lane(device))) for _ in range(LANES)]
        self._compiler = ThreadPoolExecutor(2, thread_name_prefix="compile")
        self._can_hash = self._compiler.submit(can_hash, device)
        self._is_exact: Future[bool] | None = None
        self._reading: list[Future[None]] = []
        self._begun: deque[tuple[Sequence[Future[None]], _Conversions, _Hashing]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pool in (self._pool, self._compiler):
            pool.shutdown(cancel_futures=True)
        if error is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was begun writes into memory that is about to be given back

    def compile(self) -> None:
        """Begin to compile the fused kernel and to prove it, in the background."""
        self._is_exact = self._compiler.submit(is_exact, self._device)

    def begin(self, checkpoint: Checkpoint, wanted: Sequence[RowsToLoad], digests: WeightDigests, fill: Fill) -> None:
        """Begin to read and to hash all that is wanted. Parts that lie apart from their values are read at once, for the kernel has to know
        their place: so much of them that the GPU has room for it.

        Raises:
            StoreError: reading these fails, or failed before; and what `fill` raised.
        """
        for some in _with_apart(wanted, APART_BYTES):
            self._begin(checkpoint, some, digests, fill)

    def _begin(self, checkpoint: Checkpoint, wanted: Sequence[RowsToLoad], digests: WeightDigests, fill: Fill) -> None:
        while len(self._begun) > _APART_AHEAD:
            self._end_first()
        conversions = _Conversions(self._device, self._read_apart(checkpoint, wanted, digests), fill)
        hashing = _Hashing(self._device, digests, on_gpu=self._can_hash_there())
        work = [(extent, hashing.add(extent), conversions.add(extent)) for extent in value_extents(wanted)]
        conversions.settle()
        hashing.settle()
        # Other streams use what was allocated and copied here.
        torch.cuda.current_stream(self._device).synchronize()
        reading = [self._pool.submit(self._load, checkpoint, *each) for each in work]
        self._reading += reading
        self._begun.append((reading, conversions, hashing))

    def _can_hash_there(self) -> bool:
        """Whether the kernel that hashes is ready; until it is, lanes hash what they read."""
        return self._can_hash.done() and self._can_hash.result()

    def _end_first(self) -> None:
        """Wait for the extents that were begun first, and until the GPU is done with what they use: it is given to others then."""
        for future in self._begun[0][0]:
            future.result()
        torch.cuda.synchronize(self._device)
        _, _, hashing = self._begun.popleft()
        hashing.finish()

    def finish(self, on_extent: Callable[[], None]) -> None:
        """Wait until all is on the GPU and converted.

        Raises:
            StoreError: reading failed; and what `fill` raised.
        """
        for future in self._made:
            future.result()
        for future in self._reading:
            future.result()
            on_extent()
        if self._is_exact is not None:
            self._is_exact.result(_COMPILE_S)  # where all layers stay packed nobody has asked yet
        while self._begun:
            self._end_first()

    def _load(self, checkpoint: Checkpoint, extent: Extent[RowsToLoad], hashed: _Hashed, convert: Convert) -> None:
        # There are as many threads as lanes, and all lanes were asked for before any extent.
        lane = self._free.get_nowait()
        try:
            with torch.cuda.stream(lane.stream), torch.inference_mode():
                data = lane.read(checkpoint, extent, hashed.here)
                hashed.there(data)
                by_kernel = self._is_exact is not None and self._is_exact.result(_COMPILE_S)
                convert(data, lane.held(extent), by_kernel=by_kernel)
        finally:
            self._free.put(lane)

    def _read_apart(self, checkpoint: Checkpoint, wanted: Sequence[RowsToLoad], digests: WeightDigests) -> dict[Range, torch.Tensor]:
        """The parts that lie apart from their values, on the GPU."""

        def read(extent: Extent[Range]) -> bytearray:
            data = bytearray(extent.stop - extent.start)
            checkpoint.read_extent(extent.file, extent.start, memoryview(data))
            digests.add(extent.items, extent.start, memoryview(data))
            return data

        extents = apart_extents(wanted)
        apart: dict[Range, torch.Tensor] = {}
        if extents:
            with ThreadPoolExecutor(_APART_READERS, thread_name_prefix="load-apart") as pool:
                for extent, data in zip(extents, pool.map(read, extents), strict=True):
                    on_gpu = torch.frombuffer(data, dtype=torch.uint8).to(self._device)
                    apart.update({part: part.of(on_gpu, extent.start) for part in extent.items})
        return apart


def _with_apart(wanted: Sequence[RowsToLoad], most_bytes: int) -> Iterator[Sequence[RowsToLoad]]:
    """What is wanted, as it comes, in runs of which no more than so many bytes lie apart from their values."""
    first, num_bytes = 0, 0
    for number, each in enumerate(wanted):
        apart_bytes = sum(part.num_bytes for part in each.apart)
        if number > first and num_bytes + apart_bytes > most_bytes:
            yield wanted[first:number]
            first, num_bytes = number, 0
        num_bytes += apart_bytes
    yield wanted[first:]


def _lead(extent: Extent[RowsToLoad]) -> int:
    """Where an extent begins in a lane's buffer: tensors keep the alignment that they have in the file."""
    return extent.start % _ALIGNMENT
