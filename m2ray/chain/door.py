"""Doors: where one thread of a stage takes micro-batches over from another."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from m2ray.chain.turns import Turns


class Door:
    """A thread that does what it is handed, in order, and a bounded number of places for the micro-batches whose work that is.

    Args:
        name: of the thread.
        places: how many micro-batches may stand here at one time, or how many tokens of theirs.
        awaited: what a micro-batch without a place waits for, in words.
        timeout_s: how long it waits.
    """

    def __init__(self, turns: Turns, name: str, places: int, awaited: str, timeout_s: float) -> None:
        self.thread = ThreadPoolExecutor(1, name)
        self._turns = turns
        self._places = self._free = places
        self._awaited = awaited
        self._timeout_s = timeout_s

    def resize(self, places: int) -> None:
        """Have so many places from now on; those that are taken stay so."""
        with self._turns.changed:
            self._free += places - self._places
            self._places = places
            self._turns.changed.notify_all()

    @contextmanager
    def place(self, epoch: int, size: int = 1) -> Iterator[Callable[..., None]]:
        """Wait for `size` places, or for all where there are fewer, and hold them. Gives a function that hands work to the thread: the place is then held until that is done.

        The work is called with the epoch and the arguments given; if it fails, the epoch has failed. A place whose work was not handed
        over is free again at the end. Raises as `Turns.wait` does.
        """
        with self._turns.changed:
            self._turns.wait(epoch, lambda: self._free >= max(1, min(size, self._places)), self._timeout_s, self._awaited)
            self._free -= size
        is_held = True

        def hand_over(work: Callable[..., None], *arguments: Any) -> None:
            nonlocal is_held
            self.thread.submit(self._work, epoch, size, work, arguments)
            is_held = False

        try:
            yield hand_over
        finally:
            if is_held:
                self._leave(size)

    def drain(self, timeout_s: float) -> None:
        """Wait until the thread has done all that it was given by now. Raises TimeoutError."""
        self.thread.submit(int).result(timeout_s)

    def _work(self, epoch: int, size: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        with self._turns.guarded(epoch):
            try:
                work(epoch, *arguments)
            finally:
                self._leave(size)

    def _leave(self, size: int) -> None:
        """Free places; they may have been taken in an earlier epoch."""
        with self._turns.changed:
            self._free += size
            self._turns.changed.notify_all()
