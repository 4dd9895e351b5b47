"""A limit of this process's host memory by a control group of Linux, the page cache of what it reads among it. Needs root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def limited_host_memory(limit_bytes: int) -> Iterator[None]:
    """Let this process, and those that it starts meanwhile, have so many bytes together. Raises OSError where groups of neither version can be made.

    What it has already stays where it was counted.
    """
    is_second = (_GROUPS / "cgroup.controllers").exists()
    parent = _GROUPS if is_second else _GROUPS / "memory"
    if is_second:
        (parent / "cgroup.subtree_control").write_text("+memory")
    group = parent / f"m2ray-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if is_second else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(process)
        group.rmdir()
