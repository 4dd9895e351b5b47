"""Threads that bring bytes into a device's memory, a piece each; to a GPU through pinned memory, on a stream beside the computation."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

READERS = min(16, 2 * (os.cpu_count() or 8))
PIECE_BYTES = 8 * 2**20
"""Of a piece, at most. A GPU's stage so has up to 128 MiB of pinned memory for what it reads."""

Reading = Future[None]

Fetch = Callable[[memoryview], None]
"""Fills memory on the host with the bytes that are wanted."""


class Readers:
    """The threads of one stage. `stream`, on a GPU, is the one on which they copy."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="packed")
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._of_thread = threading.local()

    def submit(self, step: Callable[..., None], *arguments: object) -> Reading:
        """Have a thread do it."""
        return self._pool.submit(step, *arguments)

    def each(self, step: Callable[..., None], arguments: Iterable[tuple[object, ...]]) -> None:
        """Have the threads do a step for each of these arguments. Raises what the first one that fails does, once all have ended."""
        futures = [self._pool.submit(step, *some) for some in arguments]
        wait(futures)
        for future in futures:
            future.result()

    def put(self, fetch: Fetch, out: torch.Tensor) -> None:
        """Fill `out`, uint8 on the device. Called by a thread of these. On a GPU the copy may still be under way."""
        if self.stream is None:
            fetch(out.numpy().data)
            return
        piece = getattr(self._of_thread, "piece", None)
        if piece is None:
            with torch.cuda.device(self._device):
                piece = self._of_thread.piece = _PinnedPiece()
        piece.copied.synchronize()
        pinned = piece.memory[: len(out)]
        fetch(pinned.numpy().data)
        with torch.cuda.stream(self.stream):
            out.copy_(pinned, non_blocking=True)
            piece.copied.record(self.stream)

    def close(self) -> None:
        """End the threads, without what they have not begun."""
        self._pool.shutdown(cancel_futures=True)


class _PinnedPiece:
    """Pinned memory, and the event after which it may be filled again."""

    def __init__(self) -> None:
        self.memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event(blocking=True)  # whoever waits leaves its core to those that read
