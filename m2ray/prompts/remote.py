"""Prompts in an object store: its files, folders and globs, found by listing and read in ranges."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import translate
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Literal

from m2ray.errors import PromptsError, StoreError
from m2ray.storage import Store, StoreFile, open_store

_MAGIC = re.compile(r"[*?[]")
_URL = re.compile(r"(?P<bucket>[a-z0-9]+://[^/?]+)/?(?P<path>.*?)(?P<options>\?[A-Za-z_-]+=.*)?", re.DOTALL)


@contextmanager
def reading_store() -> Iterator[None]:
    """Turn a StoreError into a PromptsError of the same words."""
    try:
        yield
    except StoreError as error:
        raise PromptsError(error.what, error.remedy) from error


@dataclass(frozen=True)
class RemotePath:
    """One object, with as much of Path as reading prompts takes."""

    store: Store
    key: str

    def __str__(self) -> str:
        return self.store.where(self.key)

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.key).suffixes

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.store, f"{self.key}/{name}" if self.key else name)

    def is_file(self) -> bool:
        """Whether there is such an object. Raises PromptsError, as all that reads."""
        with reading_store():
            return self.store.size(self.key) is not None

    def read_bytes(self) -> bytes:
        with reading_store():
            return self.store.read(self.key)

    def file(self) -> StoreFile:
        """The object, each read a request."""
        with reading_store():
            return StoreFile(self.store, self.key)

    def open(self, mode: Literal["rb"] = "rb") -> BufferedReader:
        """The object, read ahead."""
        return self.file().buffered()


def find_remote(url: str) -> tuple[RemotePath, list[tuple[RemotePath, str]]]:
    """What lies at a URL: the path itself, and the files there with their names below it, sorted.

    One object; or every object below a folder, without those whose name, or that of a folder on the way, begins with "." or
    "_"; or those that match a glob (`*`, `?`, `[...]`, and `**` for any number of folders).

    Raises:
        PromptsError: nothing is there, or the store cannot be read.
    """
    match = _URL.fullmatch(url)
    assert match is not None, "the scheme was looked at before"
    with reading_store():
        at = RemotePath(open_store(match["bucket"] + (match["options"] or "")), match["path"].strip("/"))
        if at.key and at.is_file():
            return at, [(at, at.name)]
        found = sorted(_matching(at) if _MAGIC.search(at.key) else _below(at), key=lambda pair: pair[1])
    if not found:
        raise PromptsError(f"There are no prompts at {at}.", "Check the URL.")
    return at, found


def _below(folder: RemotePath) -> Iterator[tuple[RemotePath, str]]:
    start = len(folder.key) + 1 if folder.key else 0
    for key, _ in folder.store.list(folder.key):
        name = key[start:]
        if not any(part.startswith((".", "_")) for part in name.split("/")):
            yield RemotePath(folder.store, key), name


def _matching(glob: RemotePath) -> Iterator[tuple[RemotePath, str]]:
    """Names are relative to the folder before the first wildcard, as those of a local glob."""
    parts = glob.key.split("/")
    fixed = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    root, wanted = "/".join(parts[:fixed]), parts[fixed:]
    if wanted[-1] == "**":
        wanted.append("*")
    start = len(root) + 1 if root else 0
    for key, _ in glob.store.list(root):
        if _matches(key[start:].split("/"), wanted):
            yield RemotePath(glob.store, key), key[start:]


def _matches(parts: list[str], wanted: list[str]) -> bool:
    """As Python's glob, recursive: a wildcard matches no "/", and no leading "." unless it is spelled out."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        goes_down = bool(parts) and not parts[0].startswith(".")
        return _matches(parts, wanted[1:]) or (goes_down and _matches(parts[1:], wanted))
    if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return bool(re.fullmatch(translate(wanted[0]), parts[0])) and _matches(parts[1:], wanted[1:])
