"""A limit on memory while something of strangers is read or run: whatever a file says, the kernel refuses what goes beyond."""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ_BYTES = 256 << 20
"""What reading a batch of rows may take, decompressed pages and dictionaries included."""

RENDER_BYTES = 256 << 20
"""What a chat template may take."""

_LOCK = threading.RLock()


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """For the length of a context this process gets `num_bytes` of memory more than it has, at most; beyond that is a MemoryError.

    It is a limit of the whole process: for short steps only, of one thread at a time. A lower limit that it has already stays.
    """
    with _LOCK:  # else a second thread would take the first one's limit for what was before, and leave it for good
        before = resource.getrlimit(resource.RLIMIT_AS)
        limit_process(num_bytes)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def limit_process(num_bytes: int) -> None:
    """The same for the rest of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
