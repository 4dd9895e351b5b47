"""What m2ray asks of a disk or an object store: ranges in, parts out, create-if-absent, durable once a call returns.

Keys are relative to the store's root, with "/" between their parts. Every failure is a StoreError that names the key.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m2ray.errors import AlreadyExistsError, StoreError
from m2ray.storage.scatter import close_rows
from m2ray.storage.scratch import scratch

Data = bytes | bytearray | memoryview
ReadPieces = Callable[[int, Sequence[memoryview]], None]


class PartSink(ABC):
    """An object being written. Nothing of it can be seen until `close`; `abort` leaves nothing behind."""

    @abstractmethod
    def write(self, data: Data) -> None:
        """Append bytes. The caller may reuse `data` afterwards."""

    def write_pieces(self, pieces: Sequence[Data]) -> None:
        """Append several pieces, in their order."""
        self.write(b"".join(pieces))

    @abstractmethod
    def close(self) -> None:
        """Make the object durable and visible under its key. Raises AlreadyExistsError if the key is taken."""

    @abstractmethod
    def abort(self) -> None:
        """Give the object up."""


class Store(ABC):
    """One root (a folder, a bucket's prefix) and the operations m2ray needs below it."""

    url: str

    @property
    def folder(self) -> Path | None:
        """Where its objects lie as files that this machine sees; None where each read is a request to a server."""
        return None

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's bytes, or None if there is no such object."""

    def sizes(self, keys: Collection[str]) -> Callable[[str], int | None]:
        """What gives the size of each of these objects, as `size` does. A store that is asked over a network is asked once a folder."""
        return self.size

    @abstractmethod
    def version(self, key: str) -> str:
        """What changes whenever the object is written anew. Raises StoreError if there is none."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `offset` on. Raises StoreError if the object ends before that."""

    @contextmanager
    def reading(self, key: str) -> Iterator[ReadPieces]:
        """What fills pieces, at most 1,024, one after the other with the object's bytes from an offset on. Raises as `read_into` does."""

        def read(offset: int, pieces: Sequence[memoryview]) -> None:
            data = scratch("pieces", sum(map(len, pieces)))
            self.read_into(key, offset, data)
            at = 0
            for piece in pieces:
                piece[:] = data[at : at + len(piece)]
                at += len(piece)

        yield read

    def read_ranges(self, key: str, offsets: Sequence[int], num_bytes: int, out: memoryview) -> None:
        """Read `num_bytes` from each of the bytes `offsets` of the object, one range behind the other in `out`. Raises as `read_into` does."""
        for start, stop in neighbours(offsets, num_bytes):
            self.read_into(key, offsets[start], out[start * num_bytes : stop * num_bytes])

    def read_rows(self, key: str, offsets: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> None:
        """Read rows that begin at the bytes `offsets` [N] of the object and lay each at its place in `out` uint8 [.., row bytes].

        Best with ascending offsets: rows that lie close together are read at once. Raises as `read_into` does.
        """
        row_bytes = out.shape[1]
        for start, stop in close_rows(offsets, row_bytes):
            begin = int(offsets[start])
            data = scratch("rows", int(offsets[stop - 1]) + row_bytes - begin)
            self.read_into(key, begin, data)
            rows_at = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), row_bytes)
            out[places[start:stop]] = rows_at[offsets[start:stop] - begin]

    @abstractmethod
    def list(self, prefix: str, depth: int | None = None) -> Iterator[tuple[str, int]]:
        """(key, bytes) of each object below the folder `prefix` ("" for all), in any order, unfinished ones left out.

        With `depth` of those that lie that many folders down or less (1: in `prefix` itself); a store may list deeper ones too.
        """

    def folders(self) -> Sequence[str]:
        """The names of the folders right below the root that hold objects, in order."""
        return sorted({key.partition("/")[0] for key, _ in self.list("", 2) if "/" in key})

    def list_folders(self, above: str, folders: Iterable[str]) -> Iterator[tuple[str, int]]:
        """What `list(above)` gives, of which only what lies in `folders` is wanted: where a listing is many requests, each of those by itself."""
        del folders
        return self.list(above)

    @abstractmethod
    def create(self, key: str, data: Data) -> None:
        """Write the object only if its key is free, atomically. Raises AlreadyExistsError otherwise."""

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Write or replace the object, atomically."""

    @abstractmethod
    def open_part(self, key: str) -> PartSink:
        """Begin an object that is written piece by piece."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects; those already gone are no error."""

    def delete_unfinished(self) -> int:
        """Delete what writers that died left behind unseen. What living writers are at stays.

        Returns:
            The number of files deleted; 0 where a store keeps unfinished objects out of sight by itself.
        """
        return 0

    def where(self, key: str) -> str:
        """The object's full name, for messages."""
        return f"{self.url}/{key}"

    def probe(self) -> None:
        """Check that the store can be written and honours create-if-absent, on which exactly-once rests.

        Raises:
            StoreError: it cannot be written, or lets a second writer replace what a first one created.
        """
        key = f"_probe-{uuid.uuid4().hex}"
        try:
            with suppress(AlreadyExistsError):  # nobody else knows the key: the first answer was lost, and the request repeated
                self.create(key, b"first")
            self.create(key, b"second")
        except AlreadyExistsError:
            self.delete([key])
            return
        except BaseException:
            with suppress(StoreError):  # which would hide why nothing could be written
                self.delete([key])
            raise
        self.delete([key])
        raise StoreError(
            f"The store at {self.url} replaces an object that was to be created only if absent (If-None-Match is ignored).",
            "Two drivers could commit the same shard there. Use a store that honours conditional writes.",
        )

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytearray:
        """The `num_bytes` bytes of the object from `offset` on."""
        out = bytearray(num_bytes)
        self.read_into(key, offset, memoryview(out))
        return out


def neighbours(offsets: Sequence[int], num_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ranges of `num_bytes` each into [start, stop) of those that lie side by side."""
    start = 0
    for stop in range(1, len(offsets) + 1):
        if stop == len(offsets) or offsets[stop] != offsets[stop - 1] + num_bytes:
            yield start, stop
            start = stop
