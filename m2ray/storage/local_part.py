"""A file on a local disk while it is written: under another name and locked by its writer, then durable and in its place at once."""

import errno
import fcntl
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from m2ray.storage.disk_errors import naming
from m2ray.storage.store import Data, PartSink

_SENT_BYTES = 32 << 20
"""Each time this much is written, the kernel is told that nobody will read it soon, and sends it to the disk at once. Otherwise the disk
would stand idle until the part is synced, and then get all of it."""


class LocalPartSink(PartSink):
    """Writes under another name, then links the file into place: link() fails if the name is taken, rename() would not."""

    def __init__(self, path: Path, unfinished: Path) -> None:
        self._path = path
        self._num_bytes = self._on_their_way = 0
        with naming("write", path):
            make_folder(path.parent)
            self._temporary, self._file = open_unfinished(unfinished, path.name)

    def write(self, data: Data) -> None:
        self.write_pieces([data])

    def write_pieces(self, pieces: Sequence[Data]) -> None:
        with naming("write", self._path):
            self._num_bytes += write_all(self._file, pieces)
            if self._num_bytes - self._on_their_way >= _SENT_BYTES:
                os.posix_fadvise(self._file.fileno(), self._on_their_way, 0, os.POSIX_FADV_DONTNEED)
                self._on_their_way = self._num_bytes

    def close(self) -> None:
        with naming("write", self._path):
            try:
                os.fsync(self._file.fileno())
                self._link()
            finally:
                self._file.close()
                self._temporary.unlink(missing_ok=True)
            fsync_folder(self._path.parent)

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _link(self) -> None:
        try:
            os.link(self._temporary, self._path)
        except FileNotFoundError:
            if not self._temporary.exists():
                raise
            make_folder(self._path.parent)  # likewise
            os.link(self._temporary, self._path)


def open_unfinished(folder: Path, name: str) -> tuple[Path, BinaryIO]:
    """A new file below `folder`, locked for as long as it is open: a lock goes away with the process that holds it."""
    make_folder(folder)
    while True:
        path = folder / f"{uuid.uuid4().hex[:12]}-{name}"
        try:
            file = path.open("xb", buffering=0)
        except FileNotFoundError:  # a start that was refused has removed the folder, since it was empty
            make_folder(folder)
            file = path.open("xb", buffering=0)
        locked(file)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # it was deleted before it was locked


def locked(file: BinaryIO, flags: int = 0) -> bool:
    """Take the file's lock. A file system without locks gives none to anybody: unfinished files stay there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except OSError:
        return False
    return True


def write_all(file: BinaryIO, pieces: Sequence[Data]) -> int:
    """Write the pieces, at most 1,024 of them, and give their bytes."""
    num_bytes = written = os.writev(file.fileno(), pieces)
    for piece in pieces if written < sum(map(len, pieces)) else ():
        left = memoryview(piece).cast("B")[min(written, len(piece)) :]
        written -= min(written, len(piece))
        while len(left):
            count = file.write(left)
            num_bytes, left = num_bytes + count, left[count:]
    return num_bytes


def make_folder(folder: Path) -> None:
    """The folder and those above it, each durable in the one that holds it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)
    except FileExistsError as error:  # a file stands where the folder should: not a key that is taken
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
