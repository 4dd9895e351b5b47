"""Backlog: the captured bytes that wait to be written or to be durable, of which a writer holds a bounded number; and what the work on them took."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from m2ray.activations.writing.part_writer import PartWriter


class Figures(NamedTuple):
    """How far a writer is: as in Backlog, and the parts that are durable, those of attempts that failed later too."""

    queued_bytes: int = 0
    written_bytes: int = 0
    waited_s: float = 0.0
    write_s: float = 0.0
    store_s: float = 0.0
    stored_parts: int = 0


class Backlog:
    """Of one writer, and of all its threads.

    Args:
        changed: the writer's condition, told whenever bytes are done.
        limit_bytes: that may wait; a layer that is larger waits alone.

    Attributes:
        queued_bytes: captured, that wait, are being written now, or are the last of a part that is not durable yet.
        written_bytes: handed to the store so far, those of failed attempts too.
        waited_s: seconds that whoever submits stood still for room.
        write_s: seconds of work, summed over the threads.
        store_s: those of them that the store took; the rest is encoding and hashing.
    """

    def __init__(self, changed: threading.Condition, limit_bytes: int) -> None:
        self._changed = changed
        self.limit_bytes = limit_bytes
        self.queued_bytes = self.written_bytes = 0
        self.waited_s = self.write_s = self.store_s = 0.0

    def take(self, num_bytes: int, is_over: Callable[[], object], deadline: float) -> bool:
        """Take room for bytes, as soon as there is enough.

        Args:
            is_over: whether they are of no use any more.
            deadline: by time.monotonic.

        Returns:
            Whether it was taken.
        """
        begin = time.monotonic()
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: is_over() or self.queued_bytes == 0 or self.queued_bytes + num_bytes <= self.limit_bytes, max(0.0, deadline - begin)
            )
            self.waited_s += time.monotonic() - begin
            if not has_room or is_over():
                return False
            self.queued_bytes += num_bytes
            return True

    def release(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self.queued_bytes -= num_bytes
            self._changed.notify_all()

    @contextmanager
    def working(self, part: PartWriter) -> Iterator[None]:
        """Count the time as that of a part, and what is written meanwhile."""
        begin, before_bytes, before_s = time.monotonic(), part.num_bytes, part.store_s
        try:
            yield
        finally:
            with self._changed:
                self.written_bytes += part.num_bytes - before_bytes
                self.write_s += time.monotonic() - begin
                self.store_s += part.store_s - before_s
