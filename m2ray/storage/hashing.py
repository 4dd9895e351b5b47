"""HashingFile: an object being written, hashed on its way; pyarrow takes it for a file."""

import time
from collections.abc import Sequence

import xxhash

from m2ray.storage.store import Data, PartSink


class HashingFile:
    """Hands bytes on to a sink until `publish` makes the object visible or `abort` gives it up.

    Attributes:
        num_bytes: bytes handed on so far.
        store_s: seconds that the sink took for them, `publish` included.
    """

    closed = False  # pyarrow asks before it writes

    def __init__(self, sink: PartSink) -> None:
        self.num_bytes = 0
        self.store_s = 0.0
        self._sink = sink
        self._xxh3 = xxhash.xxh3_64()
        self._is_aborted = False

    @property
    def xxh3(self) -> str:
        """xxh3-64 of the bytes so far but those of `write_pieces`, 16 hex digits."""
        return self._xxh3.hexdigest()

    def write(self, data: Data) -> int:
        if not self._is_aborted:  # pyarrow writes a footer whenever its writer goes away
            self._xxh3.update(data)
            begin = time.monotonic()
            self._sink.write(data)
            self.store_s += time.monotonic() - begin
            self.num_bytes += len(data)
        return len(data)

    def write_pieces(self, pieces: Sequence[Data]) -> None:
        """Append pieces that say by themselves whether they are whole: they are left out of the hash."""
        begin = time.monotonic()
        self._sink.write_pieces(pieces)
        self.store_s += time.monotonic() - begin
        self.num_bytes += sum(map(len, pieces))

    def publish(self) -> None:
        """Make the object durable and visible. Raises StoreError."""
        begin = time.monotonic()
        self._sink.close()
        self.store_s += time.monotonic() - begin

    def abort(self) -> None:
        """Give the object up; what is written from now on goes nowhere."""
        self._is_aborted = True
        self._sink.abort()
