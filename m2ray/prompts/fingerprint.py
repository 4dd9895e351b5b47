"""Fingerprint: what the prompt files held, taken from the very bytes that the survey reads."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import xxhash

from m2ray.errors import PromptsError
from m2ray.prompts.readers import PromptFile
from m2ray.prompts.remote import RemotePath, reading_store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PIECE_BYTES = 1 << 20


class Fingerprint:
    """xxh3-128 over each file's name, size and bytes, in the order in which they are added."""

    def __init__(self, digest: xxhash.xxh3_128 | None = None) -> None:
        self._digest = digest or xxhash.xxh3_128()

    def add(self, file: PromptFile) -> None:
        """Take a file that is not read for its records. Raises PromptsError."""
        with _opened(file) as data:
            self._begin(file, data)
            self._take_rest(data)

    @contextmanager
    def reading(self, file: PromptFile) -> Iterator[PromptFile]:
        """Around the reading of all of a file's records: gives the file to read them from.

        What is read from front to back is hashed as it passes. What is read here and there is hashed before and after.

        Raises:
            PromptsError: the file changed while it was read, or cannot be read.
        """
        if not file.is_read_in_order:
            before = self._digest.copy()
            Fingerprint(before).add(file)
            yield file
            self.add(file)
            if before.digest() != self._digest.digest():
                raise _changed(file)
            return
        with _opened(file) as data:
            num_bytes = self._begin(file, data)
            through = copy(file)
            through.path = cast("Path", _OpenPath(file.path, _HashingReader(data, self._digest)))
            yield through
            self._take_rest(data)  # what follows the last record, such as padding behind a gzip member
            if data.tell() != num_bytes:
                raise _changed(file)

    def hexdigest(self) -> str:
        """32 hex digits."""
        return self._digest.hexdigest()

    def _begin(self, file: PromptFile, data: IO[bytes]) -> int:
        """Take the name and the size of an open file, and give its size in bytes."""
        num_bytes = data.seek(0, os.SEEK_END)
        data.seek(0)
        self._digest.update(f"{file.name}\0{num_bytes}\0".encode("utf-8", "surrogateescape"))
        return num_bytes

    def _take_rest(self, data: IO[bytes]) -> None:
        while piece := data.read(_PIECE_BYTES):
            self._digest.update(piece)


class _HashingReader(io.RawIOBase):
    """An open file whose bytes are hashed as they are read. Closing it leaves the file open."""

    def __init__(self, data: IO[bytes], digest: xxhash.xxh3_128) -> None:
        super().__init__()
        self._data = data
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        out = memoryview(buffer).cast("B")
        piece = self._data.read(len(out))
        out[: len(piece)] = piece
        self._digest.update(piece)
        return len(piece)


class _OpenPath:
    """The path of a file that is open already, with as much of Path as a format that is read in order takes."""

    def __init__(self, path: Path | RemotePath, data: _HashingReader) -> None:
        self.suffix = path.suffix
        self._name = str(path)
        self._data = data

    def __str__(self) -> str:
        return self._name

    def open(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._data, _PIECE_BYTES)


@contextmanager
def _opened(file: PromptFile) -> Iterator[IO[bytes]]:
    try:
        with reading_store(), file.path.open("rb") as data:
            yield data
    except OSError as error:
        raise PromptsError(f"Cannot read {file.path}: {error.strerror}.", "Check the file and the permission to read it.") from error


def _changed(file: PromptFile) -> PromptsError:
    return PromptsError(f"{file.path} changed while it was read.", "Run the command again once nobody writes it.")
