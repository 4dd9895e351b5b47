"""Two buffers on the device, in which the next layer lands while one runs."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from m2ray.model.residency.places import InCheckpoint, LandingPlace
from m2ray.model.residency.readers import Readers


class _Buffer:
    """A buffer, the layer that is in it or comes, and on a GPU the event after which it is there."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.number: int | None = None
        self.coming: Future[None] | None = None
        self.landed = torch.cuda.Event() if device.type == "cuda" else None


class Landing:
    """Brings layers in turn, each by a thread of its own.

    From host memory one comes after the other. Of two that are read the second one's reading begins as the first one's last pieces come, so that the disk
    has always as much to do.
    """

    def __init__(self, places: Mapping[int, LandingPlace], sizes: Mapping[int, int], readers: Readers, device: torch.device) -> None:
        """Args:
        places: where each layer lies, by its number.
        sizes: bytes of each.
        """
        self._places, self._sizes, self._device = places, sizes, device
        self._stream = readers.stream
        are_read = all(isinstance(place, InCheckpoint) for place in places.values())
        self._threads = ThreadPoolExecutor(2 if are_read else 1, thread_name_prefix="landing")
        self._buffers = [_Buffer(max(sizes.values()), device) for _ in range(min(2, len(places)))]
        if self._stream is not None:
            for buffer in self._buffers:
                buffer.memory.record_stream(self._stream)  # a stage that ends leaves a copy under way, which nobody else's bytes may meet

    def runs(self, number: int) -> list[torch.Tensor]:
        """Each buffer's memory, as long as that layer's run."""
        return [buffer.memory[: self._sizes[number]] for buffer in self._buffers]

    def begin(self, number: int, running: int | None = None) -> None:
        """Begin to bring a layer, if it is not there, into the buffer that `running` is not in, once what was begun on the device so far is done."""
        if any(buffer.number == number for buffer in self._buffers):
            return
        place = next(place for place, buffer in enumerate(self._buffers) if running is None or buffer.number != running)
        buffer = self._buffers[place]
        used = None
        if self._stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self._device))
        buffer.number, buffer.coming = number, self._threads.submit(self._fill, buffer, number, used, buffer.coming)

    def wait(self, number: int) -> int:
        """Which buffer a layer is in that was begun to be brought, once it is there; on a GPU for what comes next on the current stream.

        Raises:
            CheckpointError, StageError, StoreError: it could not be read.
        """
        place, buffer = next((place, buffer) for place, buffer in enumerate(self._buffers) if buffer.number == number)
        assert buffer.coming is not None
        error = buffer.coming.exception()
        if error is not None:
            buffer.number = None  # so that another pass tries again
            raise error
        if buffer.landed is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.landed)
        return place

    def _fill(self, buffer: _Buffer, number: int, used: "torch.cuda.Event | None", before: Future[None] | None) -> None:
        run = buffer.memory[: self._sizes[number]]
        if before is not None:  # of a pass that was given up; it has begun, and whether it fails is nobody's matter any more
            before.exception()
        if self._stream is None:
            self._places[number].bring(run)
            return
        assert used is not None
        assert buffer.landed is not None
        self._stream.wait_event(used)
        with torch.cuda.stream(self._stream):
            self._places[number].bring(run)
            buffer.landed.record(self._stream)
