"""Where a packed layer's run lies while the layer does not run: on its device, in host memory, or in files."""

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from m2ray.errors import StageError
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.interpreter import quick_switches
from m2ray.model.registered import register, unregister
from m2ray.model.residency.packed_layer import PackedLayer
from m2ray.model.residency.readers import PIECE_BYTES, Fetch, Readers
from m2ray.storage.scratch import scratch

_COPY_BYTES, _COPIES = 16 * 2**20, 2
"""Of a copy to a GPU, and how many are asked for at a time: whatever else is copied there waits for these, and would for the whole layer."""


class Place(Protocol):
    """What holds one layer's run."""

    def keep(self, at: int, num_bytes: int, fetch: Fetch) -> None:
        """Have `fetch` give these bytes of the run, as they are read for the first time, and keep them. Called by the readers' threads."""

    def settle(self) -> None:
        """All bytes are there."""


class LandingPlace(Place, Protocol):
    """One from which the run has to be brought."""

    def bring(self, run: torch.Tensor) -> None:
        """Fill `run`, uint8 on the device. On a GPU the copies on the readers' stream may still be under way."""


class OnDevice:
    """The run in the device's own memory, from which it is unpacked: nothing has to be brought."""

    def __init__(self, run: torch.Tensor, readers: Readers) -> None:
        self.run = run
        self._readers = readers

    def keep(self, at: int, num_bytes: int, fetch: Fetch) -> None:
        self._readers.put(fetch, self.run[at : at + num_bytes])

    def settle(self) -> None:
        if self._readers.stream is not None:
            self._readers.stream.synchronize()


class InHostMemory:
    """The run in pinned host memory, for a GPU."""

    def __init__(self, run: torch.Tensor, device: torch.device) -> None:
        self.run = run
        self._device = device

    def keep(self, at: int, num_bytes: int, fetch: Fetch) -> None:
        fetch(self.run[at : at + num_bytes].numpy().data)

    def settle(self) -> None:
        """Raises OutOfMemoryError: the system does not let so much memory be pinned."""
        # torch's own pinned memory comes in powers of two: up to twice of what a layer takes.
        error = register(self.run.data_ptr(), len(self.run), self._device)
        if error:
            raise torch.OutOfMemoryError(f"{len(self.run)} bytes of host memory could not be pinned: CUDA error {error}.")
        # Before the memory is given back: what is allocated at its place later could not be registered again.
        weakref.finalize(self, _unregister, self.run.data_ptr(), self._device).atexit = False

    def bring(self, run: torch.Tensor) -> None:
        under_way: deque[torch.cuda.Event] = deque()
        with quick_switches():  # a copy takes 0.3 ms
            for there, here in zip(run.split(_COPY_BYTES), self.run.split(_COPY_BYTES), strict=True):
                if len(under_way) == _COPIES:
                    under_way.popleft().synchronize()
                there.copy_(here, non_blocking=True)
                under_way.append(torch.cuda.Event(blocking=True))
                under_way[-1].record(torch.cuda.current_stream(run.device))


def host_memory(num_bytes: int) -> torch.Tensor:
    """Memory of this process alone, uint8. It is without a name: gone with the process, whatever ends that."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages; with them memory is there, and registered, several times as fast
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class InCheckpoint:
    """The run in the model's own files, or in a copy without a name in a folder on a disk; read each time."""

    def __init__(self, layer: PackedLayer, checkpoint: Checkpoint, folder: str, readers: Readers) -> None:
        """`folder`: where a copy lies; "" for none. Raises StageError: it cannot be written, or has too little room."""
        self._layer = layer
        self._checkpoint = checkpoint
        self._versions = checkpoint.versions({read.file for read in layer.reads})
        self._copy = UnnamedFile(folder, layer.num_bytes) if folder else None
        self._readers = readers

    def keep(self, at: int, num_bytes: int, fetch: Fetch) -> None:
        data = scratch("packed", num_bytes)
        fetch(data)
        if self._copy is not None:
            self._copy.write(at, data)

    def settle(self) -> None:
        pass

    def bring(self, run: torch.Tensor) -> None:
        """Raises StoreError: a file cannot be read. CheckpointError: it was written anew. StageError: the copy cannot be read."""
        self._readers.each(self._readers.put, ((fetch, run[at : at + num_bytes]) for fetch, at, num_bytes in self._pieces()))
        if self._copy is None:
            self._checkpoint.require_versions(self._versions)

    def _pieces(self) -> Iterator[tuple[Fetch, int, int]]:
        """What fetches bytes of the run, their place in it, and their number."""
        for read in self._layer.reads:
            for offset, at, num_bytes in read.pieces(PIECE_BYTES):
                if self._copy is None:
                    yield partial(self._checkpoint.read_extent, read.file, offset), at, num_bytes
                else:
                    yield partial(self._copy.read, at), at, num_bytes


class UnnamedFile:
    """A file that no folder lists: it is gone with the process."""

    def __init__(self, folder: str, num_bytes: int) -> None:
        """Raises StageError: the folder cannot be written, or has too little room."""
        self._folder = folder
        with self._naming(f"A layer of {num_bytes:,} bytes cannot be kept"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as the layer
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)

    def write(self, at: int, data: memoryview) -> None:
        """Write bytes at their place. Raises StageError."""
        with self._naming("A layer cannot be written"):
            while data:
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count

    def read(self, at: int, out: memoryview) -> None:
        """Fill `out` from that place on. Raises StageError."""
        with self._naming("A layer that is kept on a disk cannot be read"):
            while out:
                count = os.preadv(self._file.fileno(), [out], at)
                if not count:
                    raise OSError(0, "its file has been cut short")
                out, at = out[count:], at + count

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{what} in {self._folder}: {error.strerror}."
            raise StageError(what, "Give another offload_folder, or free some of its disk.") from error


def _unregister(address: int, device: torch.device) -> None:
    """End the registration of a layer's memory, once no copy out of it to the device is under way."""
    torch.cuda.synchronize(device)
    unregister(address)
