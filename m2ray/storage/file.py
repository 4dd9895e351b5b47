"""StoreFile: an object of a store as a Python file to read and to seek in, a range at a time."""

import io
from typing import TYPE_CHECKING

from m2ray.errors import StoreError
from m2ray.storage.store import Store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_READ_AHEAD_BYTES = 8 << 20


class StoreFile(io.RawIOBase):
    """Unbuffered: each read is a request.

    Raises:
        StoreError: there is no such object; later, a range cannot be read.
    """

    def __init__(self, store: Store, key: str) -> None:
        super().__init__()
        size = store.size(key)
        if size is None:
            raise StoreError(f"There is no {store.where(key)}.", "Check its name.")
        self.num_bytes = size
        self._store = store
        self._key = key
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self.num_bytes)[whence])
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        out = memoryview(buffer).cast("B")
        num_bytes = max(0, min(len(out), self.num_bytes - self._position))
        self._store.read_into(self._key, self._position, out[:num_bytes])
        self._position += num_bytes
        return num_bytes

    def buffered(self) -> io.BufferedReader:
        """The file with a buffer, for many small reads in a row."""
        return io.BufferedReader(self, _READ_AHEAD_BYTES)
