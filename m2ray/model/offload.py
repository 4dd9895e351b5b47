"""Layers whose weights stay in host memory and are on the device only while they run."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

_ALIGNMENT = 256


class OffloadedLayers:
    """Takes turns on two buffers of the device: the next layer's weights are copied in while one layer computes.

    A copy of a layer takes many times as long as its computation, so this is for what does not fit, never for speed.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Args:
        layers: with their weights in host memory, in the order in which they run.
        device: where they run.
        """
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._layers = [_HostLayer(layer, pinned=self._on_gpu) for layer in layers]
        num_bytes = max(layer.num_bytes for layer in self._layers)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._used = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._coming: int | None = None
        self._turn = 0
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, place))
            # Before the hook that ends the span's forward pass by an exception.
            layer.register_forward_hook(partial(self._leave, place), prepend=True)

    def _enter(self, place: int, *_: Any) -> None:
        if self._coming != place:
            self._fetch(place)
        number = self._turn % 2
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[number])
        self._layers[place].point_into(self._buffers[number])
        self._turn += 1
        self._fetch((place + 1) % len(self._layers))

    def _leave(self, place: int, *_: Any) -> None:
        self._layers[place].point_home()
        if self._stream is not None:
            self._used[(self._turn - 1) % 2].record(torch.cuda.current_stream(self._stream.device))

    def _fetch(self, place: int) -> None:
        """Begin to copy a layer into the buffer whose turn is next, once its last user is done."""
        number = self._turn % 2
        self._coming = place
        if self._stream is None:
            self._layers[place].copy_into(self._buffers[number])
            return
        self._stream.wait_event(self._used[number])
        with torch.cuda.stream(self._stream):
            self._layers[place].copy_into(self._buffers[number])
            self._copied[number].record(self._stream)


class _HostLayer:
    """One layer's tensors, one after the other in one run of host memory, so that one copy moves them all."""

    def __init__(self, layer: nn.Module, *, pinned: bool) -> None:
        self._tensors = list(layer.parameters())
        self._offsets: list[int] = []
        self.num_bytes = 0
        for tensor in self._tensors:
            self._offsets.append(self.num_bytes)
            self.num_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._home = torch.empty(self.num_bytes, dtype=torch.uint8)
        if pinned:
            # torch's own pinned memory comes in powers of two: up to twice of what a layer takes.
            error = torch.cuda.cudart().cudaHostRegister(self._home.data_ptr(), self.num_bytes, 0)
            if int(error):
                raise torch.OutOfMemoryError(f"{self.num_bytes} bytes of host memory could not be pinned: CUDA error {int(error)}.")
        for tensor, view in zip(self._tensors, self._views(self._home), strict=True):
            view.copy_(tensor)
            tensor.data = view

    def copy_into(self, buffer: torch.Tensor) -> None:
        buffer[: self.num_bytes].copy_(self._home, non_blocking=True)

    def point_into(self, buffer: torch.Tensor) -> None:
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def point_home(self) -> None:
        self.point_into(self._home)

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        ]
