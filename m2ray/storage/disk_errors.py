"""What is said where a file system refuses something: which file, why, and what helps."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2ray.errors import AlreadyExistsError, StoreError

_ROOM_BYTES = 64 << 20

_AGAIN = "and run the same command again; finished shards are kept."


@contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that says which file and what to do."""
    try:
        yield
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} exists already.") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"Cannot {action} {path}: {reason}.", remedy_for(error, path)) from error


def remedy_for(error: OSError, path: Path) -> str:
    """What helps against what a file system says of `path`; "" where nothing is known to help."""
    if error.errno == errno.ENOSPC:
        return _full(path)
    return {
        errno.EACCES: "Give the user that runs m2ray the permission, or choose another folder.",
        errno.EPERM: "Give the user that runs m2ray the permission, or choose another folder.",
        errno.EROFS: "The disk is mounted read-only: choose another folder.",
        errno.EDQUOT: f"This user's quota on the disk is used up: free space, or have it raised, {_AGAIN}",
        errno.ENOENT: "Check the path.",
        errno.ENOTDIR: f"{_no_folder(path)} is no folder: choose another one.",
        errno.ENAMETOOLONG: "Choose a shorter path.",
    }.get(error.errno or 0, "")


def _no_folder(path: Path) -> Path:
    """What stands where a folder of the path should be; the path itself where that cannot be told."""
    return next((place for place in (*reversed(path.parents), path) if place.exists() and not place.is_dir()), path)


def _full(path: Path) -> str:
    """A file system has no room for bytes, or none for the names of more files, which is said by the same error."""
    place = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        found = os.statvfs(place)
    except OSError:
        return f"The disk is full: free space {_AGAIN}"
    free_bytes = found.f_bavail * found.f_frsize
    if found.f_files and not found.f_favail and free_bytes:
        return (
            f"The disk has {free_bytes:,} bytes left, but no inode: it holds {found.f_files:,} files, as many as it can. Delete files there "
            f"(larger shards make fewer: shard_tokens, in another run) {_AGAIN}"
        )
    if free_bytes >= _ROOM_BYTES:
        return f"The disk has {free_bytes:,} bytes left by now, and had none, or a limit of its own is reached: look at it {_AGAIN}"
    return f"The disk is full: free space {_AGAIN}"
