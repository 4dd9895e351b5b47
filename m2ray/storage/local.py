"""LocalStore: a folder on a local or shared disk."""

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from m2ray.errors import StoreError
from m2ray.storage.address import without_secrets
from m2ray.storage.disk_errors import naming
from m2ray.storage.local_part import LocalPartSink, fsync_folder, locked, make_folder, open_unfinished, write_all
from m2ray.storage.scatter import close_rows, scattered
from m2ray.storage.store import Data, PartSink, ReadPieces, Store, neighbours

_UNFINISHED = "_unfinished"
_OF_THE_FILE_SYSTEM = "lost+found"
_SCATTERED_ROW_BYTES = 1024


def with_home(path: Path) -> Path:
    """The path with its "~" or "~user" spelled out. Raises StoreError where that user has no home."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise StoreError(f"{path} begins with {path.parts[0]}, and that user has no home folder here.", "Write the folder out.") from error


def local_folder(url: str) -> Path | None:
    """The folder of a path or a `file://` URL; None for a URL of another scheme. Raises StoreError for one that names a host or an absent home."""
    if "://" not in url:
        return with_home(Path(url))
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise StoreError(
            f"{without_secrets(url)!r} names the host {parts.hostname!r}, and files are read from this machine's disks alone.",
            "Write file:///folder with three slashes, or a path.",
        )
    return Path(unquote(parts.path))


@contextmanager
def no_empty_folders(url: str | None) -> Iterator[None]:
    """Remove the folders that come to be at a local run folder meanwhile, if they are empty: where no run begins, all is left as it was."""
    before = _folders(url)
    try:
        yield
    finally:
        for folder in sorted(_folders(url) - before, reverse=True):  # each before the one that holds it
            with suppress(OSError):
                folder.rmdir()


def _folders(url: str | None) -> set[Path]:
    """The folders on the way to a local run folder and those in it that can be seen."""
    with suppress(StoreError, OSError):
        root = local_folder(url) if url else None
        if root is not None:
            inside = root.iterdir() if root.is_dir() else ()
            return {folder for folder in (root, *root.parents, *inside) if folder.is_dir() and not folder.is_symlink()}
    return set()


class LocalStore(Store):
    """A folder on a local or shared disk. Every write is fsynced, the file and its folder.

    What is being written lies in `_unfinished/`, locked by its writer, and is linked into place once it is whole.
    """

    def __init__(self, root: Path, *, follows_links: bool = False) -> None:
        """`follows_links`: `list` goes into links to folders too. For what is only read: behind a link lies what is another's to delete."""
        self._folder = with_home(root)
        self._follows_links = follows_links
        self.url = str(self._folder)
        with suppress(FileNotFoundError):  # the working folder is gone, and nothing lies in it
            self._folder = self._folder.absolute()  # a run that a notebook opened is read on where it is, wherever the process goes

    @property
    def folder(self) -> Path:
        return self._folder

    def path(self, key: str) -> Path:
        return self._folder / key

    def size(self, key: str) -> int | None:
        with naming("read", self.path(key)):
            try:
                found = self.path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return None if stat.S_ISDIR(found.st_mode) else found.st_size

    def version(self, key: str) -> str:
        with naming("read", self.path(key)):
            found = self.path(key).stat()
        return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"  # not st_dev: machines that share a disk number it otherwise

    def read(self, key: str) -> bytes:
        with naming("read", self.path(key)):
            return self.path(key).read_bytes()

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        self.read_ranges(key, [offset], len(out), out)

    def read_ranges(self, key: str, offsets: Sequence[int], num_bytes: int, out: memoryview) -> None:
        """The file is opened once."""
        path = self.path(key)
        with naming("read", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, stop in neighbours(offsets, num_bytes):
                    _read_all(fd, path, offsets[start], out[start * num_bytes : stop * num_bytes])
            finally:
                os.close(fd)

    @contextmanager
    def reading(self, key: str) -> Iterator[ReadPieces]:
        """The file is opened once, and the kernel fills all pieces at once."""
        path = self.path(key)

        def read(offset: int, pieces: Sequence[memoryview]) -> None:
            done = os.preadv(fd, pieces, offset)
            for piece in pieces if done < sum(map(len, pieces)) else ():  # the file ends there, or a signal came
                left = piece[min(done, len(piece)) :]
                done, offset = done - (len(piece) - len(left)), offset + len(piece)
                _read_all(fd, path, offset - len(left), left)

        with naming("read", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield read
            finally:
                os.close(fd)

    def read_rows(self, key: str, offsets: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> None:
        """The kernel lays long rows where they belong, which saves a copy; of short ones each would cost more than the copy."""
        row_bytes = out.shape[1]
        if row_bytes < _SCATTERED_ROW_BYTES:
            super().read_rows(key, offsets, out, places)
            return
        with naming("read", self.path(key)):
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, stop in close_rows(offsets, row_bytes):
                    run = slice(start, stop)
                    if not scattered(fd, offsets[run], out, places[run]):  # the file ends there, or a signal came
                        super().read_rows(key, offsets[run], out, places[run])
            finally:
                os.close(fd)

    def list(self, prefix: str, depth: int | None = None) -> Iterator[tuple[str, int]]:
        """A link that is not followed is listed as itself, and so is one to nothing: reading it says so."""
        return self._below(self.path(prefix), depth, frozenset())

    def _below(self, folder: Path, depth: int | None, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
        """Files first. `above` are the device and inode of the folders on the way, which a loop of links would come to again."""
        with naming("list", folder):
            try:
                found = folder.stat()
                with os.scandir(folder) as listing:
                    entries = [(entry, self._is_folder(entry)) for entry in listing]
            except (FileNotFoundError, NotADirectoryError):
                return
            except PermissionError:
                if folder.name == _OF_THE_FILE_SYSTEM:  # at the top of a disk, for its own repair alone: nobody puts prompts or runs there
                    return
                raise
        way = above | {(found.st_dev, found.st_ino)}
        if way == above:
            raise StoreError(f"{folder} is one of the folders that it lies in: a link leads round in a circle.", "Remove the link.")
        base = "" if folder == self._folder else f"{folder.relative_to(self._folder).as_posix()}/"
        for entry, is_folder in entries:
            num_bytes = None if is_folder else _num_bytes(entry)
            if num_bytes is not None:
                yield base + entry.name, num_bytes
        for entry, is_folder in entries:
            if is_folder and depth != 1 and Path(entry.path) != self.path(_UNFINISHED):
                yield from self._below(Path(entry.path), depth and depth - 1, way)

    def _is_folder(self, entry: "os.DirEntry[str]") -> bool:
        try:
            return entry.is_dir(follow_symlinks=self._follows_links)
        except NotADirectoryError:  # a link to what would lie below a file
            return False

    def create(self, key: str, data: Data) -> None:
        sink = self.open_part(key)
        try:
            sink.write(data)
            sink.close()
        except BaseException:
            sink.abort()
            raise

    def put(self, key: str, data: Data) -> None:
        path = self.path(key)
        with naming("write", path):
            make_folder(path.parent)
            temporary, file = open_unfinished(self.path(_UNFINISHED), path.name)
            try:
                with file:
                    write_all(file, [data])
                    os.fsync(file.fileno())
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            fsync_folder(path.parent)

    def open_part(self, key: str) -> PartSink:
        return LocalPartSink(self.path(key), self.path(_UNFINISHED))

    def delete(self, keys: Iterable[str]) -> None:
        """Raises StoreError for one behind a link to a folder, of which nobody knows whose it is."""
        for key in keys:
            with naming("delete", self.path(key)):
                links = [folder for folder in map(str, PurePosixPath(key).parents) if folder != "." and self.path(folder).is_symlink()]
                if links:
                    raise StoreError(
                        f"{self.path(key)} is not deleted: {self.path(links[0])} is a link to a folder.",
                        "Put the folder itself in the place of the link; the whole run folder may be a link.",
                    )
                with suppress(FileNotFoundError, NotADirectoryError):  # where a file stands in the place of its folder there is none
                    self.path(key).unlink()

    def delete_unfinished(self) -> int:
        folder, num_deleted = self.path(_UNFINISHED), 0
        with naming("delete", folder):
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                with suppress(FileNotFoundError), path.open("r+b") as file:
                    if locked(file, fcntl.LOCK_NB):
                        path.unlink()
                        num_deleted += 1
        return num_deleted


def _num_bytes(entry: "os.DirEntry[str]") -> int | None:
    """The size of a listed file, of the link itself where that leads nowhere or to a folder; None if it was deleted since."""
    with suppress(OSError):  # what is no file, or is gone, is looked at below
        found = entry.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    with naming("list", Path(entry.path)):
        try:
            found = entry.stat()
            return (entry.stat(follow_symlinks=False) if stat.S_ISDIR(found.st_mode) else found).st_size
        except (FileNotFoundError, NotADirectoryError):
            return entry.stat(follow_symlinks=False).st_size if entry.is_symlink() else None


def _read_all(fd: int, path: Path, offset: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if count == 0:
            raise StoreError(
                f"{path} ends at byte {offset + done}, but bytes {offset} to {offset + len(out)} are needed.",
                "The file is truncated: copy it again.",
            )
        done += count
