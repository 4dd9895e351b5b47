"""What a micro-batch leaves of a stage, or of a run of its layers."""

import time
from collections.abc import Iterator
from functools import cached_property

import torch

from m2ray.batches import CapturedLayer, MicroBatch
from m2ray.model.boundary import Boundary
from m2ray.model.capture import Capture


class Timed:
    """The time that a micro-batch's layers take: CUDA events on a GPU, where calls return before the work is done."""

    end: "torch.cuda.Event | None" = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began_s = time.perf_counter()
        self._elapsed_s = 0.0
        if device.type == "cuda":
            self._begin = self._event()

    def finish(self) -> None:
        if self._device.type == "cuda":
            self.end = self._event()
        self._elapsed_s = time.perf_counter() - self._began_s

    @property
    def elapsed_s(self) -> float:
        if self.end is None:
            return self._elapsed_s
        self.end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self.end)
        return milliseconds / 1000

    def until_s(self, event: "torch.cuda.Event | None") -> float:
        """From the end to a later event."""
        if self.end is None or event is None:
            return 0.0
        for each in (self.end, event):
            each.synchronize()
        milliseconds: float = self.end.elapsed_time(event)
        return max(0.0, milliseconds / 1000)

    def _event(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class StageOutput:
    """What one micro-batch leaves: the boundary for the next stage (None from the model's last layer), and captured rows.

    In a wave it comes in pieces, a run of layers each: `leaves` says whether this is the last, which has the boundary.

    On a GPU neither need be computed yet: `ready` is the event after which the boundary is, `on_host` and `captured`
    wait by themselves, and may be used on other threads.
    """

    def __init__(self, micro_batch: MicroBatch, boundary: Boundary | None, capture: Capture, timed: Timed, *, leaves: bool) -> None:
        self.micro_batch = micro_batch
        self.boundary = boundary
        self.leaves = leaves
        self.ready = timed.end
        self._capture = capture
        self._timed = timed

    @cached_property
    def captured(self) -> tuple[CapturedLayer, ...]:
        """One entry a part of these layers, on the host. Raises StageError if a row is not finite in the store dtype."""
        return self._capture.finish()

    def arriving(self) -> Iterator[tuple[CapturedLayer, ...]]:
        """The same in pieces, layer after layer as they come to the host, once and instead of `captured`."""
        return iter([self.captured]) if self._capture.copied is None else self._capture.arriving()

    @cached_property
    def compute_s(self) -> float:
        """Seconds between the first layer's begin and the last one's end, on the device's own clock. Waits for the end."""
        return self._timed.elapsed_s

    @property
    def copy_s(self) -> float:
        """Seconds for which rows were still on their way to the host after that, by the same clock. Waits for their end."""
        return self._timed.until_s(self._capture.copied)

    def on_host(self) -> Boundary:
        """The boundary in host memory; from a GPU in pinned memory, copied beside whatever is computed next."""
        assert self.boundary is not None, "the last stage has nobody to hand on to"
        if self.ready is None:
            return self.boundary
        stream = torch.cuda.Stream(self.boundary.hidden_BTH.device)
        stream.wait_event(self.ready)

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return on_host

        with torch.cuda.stream(stream):
            on_host = self.boundary.map(copied)
        stream.synchronize()
        return on_host
