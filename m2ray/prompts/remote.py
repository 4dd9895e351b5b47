"""Where prompts lie, on a disk or in an object store: files, folders and globs, found by listing; and objects as paths to read."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import translate
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Literal

from m2ray.errors import PromptsError, StoreError
from m2ray.storage import SCHEMES, LocalStore, Store, StoreFile, local_folder, open_store, without_secrets

_MAGIC = re.compile(r"[*?[]")
_FROM_A_HUB = "m2ray downloads nothing; of a hub's data set: hf download OWNER/NAME --repo-type dataset --local-dir FOLDER."
_URL = re.compile(r"(?P<bucket>(?P<scheme>[a-z0-9]+)://[^/?]+)/?(?P<path>.*?)(?P<options>\?[A-Za-z_-]+=.*)?", re.DOTALL)


@contextmanager
def reading_store() -> Iterator[None]:
    """Turn a StoreError into a PromptsError of the same words."""
    try:
        yield
    except StoreError as error:
        raise PromptsError(*error.args) from error


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


PromptPath = Path | RemotePath


def find(prompts: str) -> tuple[PromptPath | None, list[tuple[PromptPath, str]]]:
    """The files at a path or URL with their names, in order; and the folder itself where it is one.

    A file; or all files below a folder, without those whose name, or that of a folder on the way, begins with "." or
    "_"; or those that match a glob (`*`, `?`, `[...]`, and `**` for any number of folders).

    Raises:
        PromptsError: nothing is there, or the store cannot be read.
    """
    with reading_store():
        store, key = _place(prompts)
        at = _path(store, key)
        if key and store.size(key) is not None:
            return None, [(at, at.name)]
        if names := sorted(_below(store, key)):
            return at, [(_path(store, f"{key}/{name}" if key else name), name) for name in names]
        root, names = _matching(store, key) if _MAGIC.search(key) else (key, [])
    if not names:
        raise _absent(at, key)
    return None, [(_path(store, f"{root}/{name}" if root else name), name) for name in names]


def file_at(address: str) -> PromptPath:
    """The file at a path or URL, whether there is one or not. Raises PromptsError for an address that is none."""
    with reading_store():
        return _path(*_place(address))


def _absent(at: PromptPath, key: str) -> PromptsError:
    if _MAGIC.search(key):
        return PromptsError(f"No file matches {at}.", "Check the pattern.")
    if isinstance(at, Path) and at.is_dir():
        return PromptsError(f"The folder {at} holds no files.", "Give one with prompts; names that begin with '.' or '_' do not count.")
    is_name = isinstance(at, Path) and not at.is_absolute() and len(at.parts) == 2 and not at.parent.exists()
    remedy = f"Check the path; every node that runs m2ray's driver must see it.{f' {_FROM_A_HUB}' if is_name else ''}"
    return PromptsError(f"The prompts {at} are absent.", remedy)


def _place(address: str) -> tuple[Store, str]:
    """The bucket or the disk, and the key in it."""
    folder = local_folder(address)
    if folder is not None:
        root = Path(folder.anchor or ".")
        return LocalStore(root, follows_links=True), "/".join(folder.relative_to(root).parts)
    match = _URL.fullmatch(address)
    if match is None or match["scheme"] not in SCHEMES:
        scheme = address.partition("://")[0]
        raise PromptsError(
            f"{without_secrets(address)!r} cannot be read: its scheme is {scheme!r}.",
            f"Give a path or one of {', '.join(SCHEMES)}. {_FROM_A_HUB}",
        )
    return open_store(match["bucket"] + (match["options"] or "")), match["path"].strip("/")


def _path(store: Store, key: str) -> PromptPath:
    return RemotePath(store, key) if store.folder is None else Path(store.url) / key  # as it was given: so it is named


def _below(store: Store, folder: str) -> Iterator[str]:
    start = len(folder) + 1 if folder else 0
    for key, _ in store.list(folder):
        name = key[start:]
        if not any(part.startswith((".", "_")) for part in name.split("/")):
            yield name


def _matching(store: Store, glob: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the names below it that match."""
    parts = glob.split("/")
    fixed = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    root, wanted = "/".join(parts[:fixed]), parts[fixed:]
    if wanted[-1] == "**":
        wanted.append("*")
    start = len(root) + 1 if root else 0
    listed = (key[start:] for key, _ in store.list(root, None if "**" in wanted else len(wanted)))
    found = [name for name in listed if _matches(name.split("/"), wanted)]
    # On a disk as its paths sort, part by part: runs that began with a glob have this order.
    return root, sorted(found, key=lambda name: name.split("/") if store.folder else [name])


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
