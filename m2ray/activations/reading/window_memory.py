"""WindowMemory: memory for a stream's windows, used again once no batch refers to it."""

import threading
import weakref

import numpy as np

from m2ray.batches import Bits
from m2ray.storage import aligned


class WindowMemory:
    """Memory of windows, used again once no batch lies in it any more: to get fresh memory takes longer than to read a window.

    Any number of threads may ask.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._lent: list[tuple[memoryview, weakref.ref[Bits]]] = []
        self._lock = threading.Lock()

    def take(self, num_rows: int) -> Bits:
        """uint8 [N, W * itemsize], in use for as long as any slice of it lives."""
        num_bytes = num_rows * self._row_bytes
        with self._lock:
            for number, (memory, array_lent) in enumerate(self._lent):
                if array_lent() is None and len(memory) == num_bytes:
                    del self._lent[number]
                    break
            else:
                self._lent = [(memory, array_lent) for memory, array_lent in self._lent if array_lent() is not None]
                memory = aligned(num_bytes)
            # Every slice, however it was cut, holds this array, since what lies behind it is none.
            array = np.frombuffer(memory, np.uint8)
            self._lent.append((memory, weakref.ref(array)))
        return array.reshape(-1, self._row_bytes)
