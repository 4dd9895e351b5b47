"""A small file system in memory that can be filled to its last byte."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZE_MB = 400
_CHUNK = bytes(64 << 10)


class SmallDisk:
    """`folder` lies on a file system of its own, `can_fill` unless mounting was not permitted."""

    def __init__(self, folder: Path, *, can_fill: bool) -> None:
        self.folder = folder
        self.can_fill = can_fill
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(_CHUNK)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """A tmpfs at `folder`, or the folder as it is where only root may mount."""
    folder.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "m2ray-faults", folder], check=False).returncode:
        yield SmallDisk(folder, can_fill=False)
        return
    try:
        yield SmallDisk(folder, can_fill=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=60)
