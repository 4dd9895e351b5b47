"""Layers whose weights live in host memory or on a disk, and are on the device only while they run."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from m2ray.errors import StageError
from m2ray.model.skeleton import ModelTensor

READERS = 4
PIECE_BYTES = 32 * 2**20
"""Bytes that a reader takes from a file at once, to a GPU through pinned memory of that size."""

_ALIGNMENT = 256


class WeightsInHost:
    """One layer's tensors, one after the other in one run of memory, so that they move as one.

    Attributes:
        num_bytes: of the run.
        memory: uint8 [num_bytes]; filled tensor by tensor as the layer is loaded.
    """

    def __init__(self, tensors: Sequence[ModelTensor]) -> None:
        self._tensors = tensors
        self._offsets: list[int] = []
        self.num_bytes = 0
        for tensor in tensors:
            self._offsets.append(self.num_bytes)
            self.num_bytes += -(-_num_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT
        self.memory = self._allocate()

    def _allocate(self) -> torch.Tensor:
        return torch.empty(self.num_bytes, dtype=torch.uint8)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tensor of the layer, by name, in a run of memory that is laid out like this one."""
        return {
            tensor.name: memory[offset : offset + _num_bytes(tensor)].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        }

    def settle(self, *, on_gpu: bool) -> None:
        """The layer is loaded."""
        if on_gpu:
            # torch's own pinned memory comes in powers of two: up to twice of what a layer takes.
            error = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.num_bytes, 0)
            if int(error):
                raise torch.OutOfMemoryError(f"{self.num_bytes} bytes of host memory could not be pinned: CUDA error {int(error)}.")
            # Before the memory is given back: what is allocated at its place later could not be registered again.
            weakref.finalize(self, _unregister, self.memory.data_ptr()).atexit = False

    def copy_into(self, buffer: torch.Tensor, _: "Readers") -> None:
        """Begin to bring the layer into `buffer`; on a GPU on the current stream."""
        buffer[: self.num_bytes].copy_(self.memory, non_blocking=True)


class WeightsOnDisk(WeightsInHost):
    """The same in a file without a name. It is mapped only while the layer is loaded: later, reading is faster."""

    def __init__(self, tensors: Sequence[ModelTensor], folder: str) -> None:
        """Raises StageError: the folder cannot be written, or has too little room."""
        self._folder = folder
        super().__init__(tensors)

    def _allocate(self) -> torch.Tensor:
        try:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - lives as long as the layer
            os.posix_fallocate(self._file.fileno(), 0, self.num_bytes)  # a disk that fills up later would end the process
        except OSError as error:
            raise StageError(
                f"A layer of {self.num_bytes:,} bytes cannot be kept in {self._folder}: {error.strerror}.",
                "Give another offload_folder, or free some of its disk.",
            ) from error
        self._mapping = mmap.mmap(self._file.fileno(), self.num_bytes)
        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def settle(self, *, on_gpu: bool) -> None:
        del on_gpu
        self._mapping.flush()
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def copy_into(self, buffer: torch.Tensor, readers: "Readers") -> None:
        readers.read(self._file.fileno(), buffer[: self.num_bytes])


class Readers:
    """Threads that read a file into a device's memory, each a piece at a time. To a GPU they copy on the caller's stream."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="offload-read")
        self._on_gpu = device.type == "cuda"
        self._lanes: SimpleQueue[_PinnedBuffer] = SimpleQueue()
        for _ in range(READERS if self._on_gpu else 0):
            self._lanes.put(_PinnedBuffer())

    def read(self, file: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8, with the begin of the file. On a GPU the last copies may still be under way.

        Raises:
            StageError: the file cannot be read.
        """
        stream = torch.cuda.current_stream(out.device) if self._on_gpu else None
        pieces = list(enumerate(out.split(PIECE_BYTES)))
        for _ in self._pool.map(lambda piece: self._read(file, piece[0] * PIECE_BYTES, piece[1], stream), pieces):
            pass

    def _read(self, file: int, offset: int, out: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
        if stream is None:
            _read_into(file, offset, out)
            return
        lane = self._lanes.get()
        try:
            lane.copied.synchronize()
            pinned = lane.pinned[: len(out)]
            _read_into(file, offset, pinned)
            with torch.cuda.stream(stream):
                out.copy_(pinned, non_blocking=True)
                lane.copied.record(stream)
        finally:
            self._lanes.put(lane)


class _PinnedBuffer:
    """A pinned buffer, and the event after which it may be filled again."""

    def __init__(self) -> None:
        self.pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()


class BroughtLayers:
    """Brings each layer into one of two buffers of the device, the next layer's weights while one computes.

    Bringing a layer takes many times as long as computing with it, so this is for what does not fit, never for speed.
    """

    def __init__(
        self, layers: Sequence[nn.Module], prefixes: Sequence[str], weights: Sequence[WeightsInHost], device: torch.device
    ) -> None:
        """Args:
        layers: in the order in which they run.
        prefixes: each layer's name in the model, with a dot.
        weights: what each was loaded into.
        device: where they run.
        """
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._weights = weights
        self._tensors = [_tensors_of(layer, prefix) for layer, prefix in zip(layers, prefixes, strict=True)]
        for each in weights:
            each.settle(on_gpu=self._on_gpu)
        self._readers = Readers(device) if any(isinstance(each, WeightsOnDisk) for each in weights) else Readers(torch.device("cpu"))
        num_bytes = max(each.num_bytes for each in weights)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._used = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._coming: tuple[int, Future[None]] | None = None
        self._num_entered = 0
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, place))
            # Before the hook that ends the span's forward pass by an exception.
            layer.register_forward_hook(partial(self._leave, place), prepend=True)

    def _enter(self, place: int, *_: Any) -> None:
        number = self._num_entered % 2
        if self._coming is None or self._coming[0] != place:
            self._begin_again()
            self._fetch(place)
        assert self._coming is not None
        self._coming[1].result()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[number])
        self._point(place, self._buffers[number])
        self._num_entered += 1
        self._fetch((place + 1) % len(self._weights))

    def _leave(self, place: int, *_: Any) -> None:
        self._point(place, self._weights[place].memory)
        if self._stream is not None:
            self._used[(self._num_entered - 1) % 2].record(torch.cuda.current_stream(self._stream.device))

    def _point(self, place: int, memory: torch.Tensor) -> None:
        for name, view in self._weights[place].views(memory).items():
            self._tensors[place][name].data = view

    def _begin_again(self) -> None:
        """After a pass that was given up: the next copies wait until its computation has left the buffers."""
        if self._stream is not None:
            for used in self._used:
                used.record(torch.cuda.current_stream(self._stream.device))

    def _fetch(self, place: int) -> None:
        """Begin to bring a layer into the buffer that comes next, once its last user is done."""
        self._coming = (place, self._thread.submit(self._fill, place, self._num_entered % 2))

    def _fill(self, place: int, number: int) -> None:
        if self._stream is None:
            self._weights[place].copy_into(self._buffers[number], self._readers)
            return
        self._stream.wait_event(self._used[number])
        with torch.cuda.stream(self._stream):
            self._weights[place].copy_into(self._buffers[number], self._readers)
            self._copied[number].record(self._stream)


def _tensors_of(layer: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}


def _unregister(address: int) -> None:
    """End the registration of a layer's memory, once no copy out of it is under way."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def _num_bytes(tensor: ModelTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _read_into(file: int, offset: int, out: torch.Tensor) -> None:
    """Fill a uint8 tensor in host memory from a file. Raises StageError."""
    left = out.numpy().data
    while left:
        try:
            count = os.preadv(file, [left], offset)
        except OSError as error:
            raise StageError(f"A layer that is kept on a disk cannot be read: {error.strerror}.", "Give another offload_folder.") from error
        if count == 0:
            raise StageError("The file of a layer that is kept on a disk has been cut short.", "Give another offload_folder.")
        left, offset = left[count:], offset + count
