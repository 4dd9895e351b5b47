"""PartQueues: the work on each part is done in its order, that on different parts side by side."""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

from m2ray.activations.writing.part_writer import PartWriter

_Work = tuple[int, "Future[None]", Callable[..., None], tuple[Any, ...]]


class PartQueues:
    """A queue for each part that has work, and threads that belong to none: whichever is free does what came first of the parts that no other is at.

    Any thread may call.

    Attributes:
        threads: those that do the work.
    """

    def __init__(self, num_threads: int) -> None:
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="write")
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._queues: dict[PartWriter, deque[_Work]] = {}
        """Of each part that waits, or that a thread is at, what is still to do."""
        self._waiting: list[tuple[int, PartWriter]] = []
        """A heap of the parts that no thread is at, by the number of what is first to do."""

    def submit(self, part: PartWriter, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Have `work` called with the arguments, once all that came of the part before is done. Raises RuntimeError: the threads were ended."""
        done: Future[None] = Future()
        with self._lock:
            number = next(self._numbers)
            if part not in self._queues:
                self.threads.submit(self._do_first)
                self._queues[part] = deque()
                heappush(self._waiting, (number, part))
            self._queues[part].append((number, done, work, arguments))
        return done

    def _do_first(self) -> None:
        """What came first; what comes after it of that part is for whichever thread is free then: this one, where the others take nothing more."""
        is_over = False
        while not is_over:
            with self._lock:
                _, part = heappop(self._waiting)
                _, done, work, arguments = self._queues[part].popleft()
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001 - handed to whoever looks at what became of it
                done.set_exception(error)
            else:
                done.set_result(None)
            del done, work, arguments  # rows among them, which nobody needs any more
            with self._lock:
                is_over = self._leave(part)

    def _leave(self, part: PartWriter) -> bool:
        """Put a part back where it has more to do. Returns whether that is no concern of this thread's."""
        if not self._queues[part]:
            del self._queues[part]
            return True
        heappush(self._waiting, (self._queues[part][0][0], part))
        with suppress(RuntimeError):  # they were ended
            self.threads.submit(self._do_first)
            return True
        return False
