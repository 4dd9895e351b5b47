"""Memory that another process maps too. Rows are captured into it, and a process beside the stage's writes them from where they lie.

It has no name in any file system: it is handed over as a descriptor, and gone with the last process that maps it.
"""

import itertools
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2ray.errors import StageError

Bytes = npt.NDArray[np.uint8]


class Place(NamedTuple):
    """Where an array uint8 [rows, row_bytes] lies: in which slab, from which byte on."""

    slab: int
    offset: int
    rows: int
    row_bytes: int


class Slab:
    """A piece of it.

    Attributes:
        number: of no other slab of this process.
        descriptor: what another process maps it by.
        memory: its bytes, as long as anything refers to them.
        address: of the first one.
    """

    def __init__(self, number: int, num_bytes: int) -> None:
        """Raises OSError: the system does not give so much."""
        self.number = number
        self.descriptor = os.memfd_create("m2ray-rows", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_bytes)
        self.memory = mmap.mmap(self.descriptor, num_bytes)
        with suppress(OSError):  # a kernel without huge pages; with them memory is there, and registered, several times as fast
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = _address(np.frombuffer(self.memory, np.uint8))

    def close(self) -> None:
        """Hand it over no more."""
        os.close(self.descriptor)


class SharedMemory:
    """All slabs of this process that another one may map. One thread adds and removes; any may look.

    Args:
        on_removed: called with the number of each that is handed over no more: its memory is there as long as another process maps it.
    """

    def __init__(self, on_removed: Callable[[int], None] = lambda _: None) -> None:
        self._on_removed = on_removed
        self._numbers = itertools.count()
        self.slabs: tuple[Slab, ...] = ()

    def add(self, num_bytes: int) -> Slab:
        """A new slab. Raises OSError."""
        slab = Slab(next(self._numbers), num_bytes)
        self.slabs = (*self.slabs, slab)
        return slab

    def remove(self, slab: Slab) -> None:
        """It is handed over no more; its memory goes when nothing refers to it."""
        self.slabs = tuple(other for other in self.slabs if other is not slab)
        slab.close()
        self._on_removed(slab.number)

    def place(self, values: Bytes) -> tuple[Slab | None, Place]:
        """Where rows uint8 [N, row_bytes] lie; no row lies nowhere. Raises StageError: they lie elsewhere, or where a later job has taken their memory's place."""
        if not len(values):
            return None, Place(-1, 0, *values.shape)
        address = _address(values)
        slab = next((slab for slab in self.slabs if 0 <= address - slab.address < len(slab.memory)), None)
        if slab is None:  # and no StopIteration, which would end whoever goes through columns, in silence
            raise StageError("Captured rows lie in no memory that the process which writes has.", "This is a defect of m2ray.")
        return slab, Place(slab.number, address - slab.address, *values.shape)


class MappedSlabs:
    """The slabs of another process, as this one maps them. One thread calls."""

    def __init__(self) -> None:
        self._slabs: dict[int, mmap.mmap] = {}

    def map(self, number: int, descriptor: int) -> None:
        """Map what was handed over. Raises OSError."""
        try:
            size = os.fstat(descriptor).st_size
            self._slabs[number] = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def unmap(self, number: int) -> None:
        """Let go of one, as soon as nothing refers to it."""
        self._slabs.pop(number, None)

    def rows(self, place: Place) -> Bytes:
        """What lies there, an array of its own: whoever still reads it refers to that."""
        if not place.rows:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._slabs[place.slab], np.uint8, place.rows * place.row_bytes, place.offset)


def _address(values: Bytes) -> int:
    address: int = values.__array_interface__["data"][0]
    return address
