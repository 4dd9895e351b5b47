"""Memory that processes of one node have together: one of them fills it, the others map it.

It has no name in any file system. Whoever fills it listens at a socket of Linux's abstract namespace and hands out a descriptor of the memory;
both are gone with the process, whatever ends that, and the memory once the last process that maps it is. The next of these then listens in its place.
"""

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
import warnings
from contextlib import ExitStack, suppress

import torch

from m2ray.errors import StageError

WAIT_S = 1800.0
"""How long a process may take to fill what another one waits for."""

_TICK_S, _AGAIN_S = 0.5, 0.01
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""So that no process that maps the memory ends because another one cuts it short."""


class NodeMemory:
    """A piece of it, as one process has it. Any thread may call.

    Attributes:
        is_ours: whether this process has to fill it.
        is_closed: whether it hands out nothing any more; what is mapped stays mapped.
        is_left: whether this process maps it no more.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        """Take the name, unless a process has it already; then there is memory to be filled.

        Args:
            name: of what it is filled with; processes of another user have other names.

        Raises:
            StageError: the system does not give so much, or no such names.
        """
        self._address = f"\0m2ray-{os.geteuid()}-{name}"
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._is_filled = False
        self.is_closed = self.is_left = False
        self._memory = -1
        self._listening: socket.socket | None = None
        self._take_the_name()

    def _take_the_name(self) -> None:
        try:
            self._listening = _listen(self._address)
            self.is_ours = self._listening is not None
            if self.is_ours:
                self._memory = _allocate(self._num_bytes)
        except OSError as error:
            self.close()  # others need not wait for what does not come
            what = f"{self._num_bytes:,} bytes of memory for all processes of this node cannot be had: {error.strerror}."
            raise StageError(what, "Ask for one replica a node.") from error

    def wait(self, timeout_s: float = WAIT_S) -> None:
        """Wait until another process has filled it. Where that is gone before, it is for this one to do.

        Raises:
            StageError: it is not filled in time, is another user's, or not what was to be expected.
        """
        deadline = time.monotonic() + timeout_s
        while self._memory < 0:
            self._memory = self._asked_for(deadline - time.monotonic())
            if self._memory < 0:
                self._take_the_name()
        self._is_filled = not self.is_ours

    def map(self, *, writable: bool) -> torch.Tensor:
        """The memory, uint8, as long as the tensor is there."""
        mapped = mmap.mmap(self._memory, self._num_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        with suppress(OSError):  # a kernel without huge pages; with them memory is there, and registered, several times as fast
            mapped.madvise(mmap.MADV_HUGEPAGE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(mapped, dtype=torch.uint8)

    def offer(self) -> None:
        """It is filled: others get it from now on."""
        self._is_filled = True

    def listen(self) -> int:
        """The number of the socket at which others ask for it: this process's if there is no other's; -1 for none."""
        with self._lock:
            if self.is_closed or not self._is_filled:
                return -1
            with suppress(OSError):  # one that has no descriptor left now looks again soon
                self._listening = self._listening or _listen(self._address)
            return self._listening.fileno() if self._listening else -1

    def give(self) -> None:
        """Hand it to a process that asks, if that is the same user's."""
        with self._lock, suppress(OSError):  # one that asks no more, or cannot take it, tells whoever started it
            if self._listening is None:
                return
            connection, _ = self._listening.accept()
            with connection:
                connection.settimeout(_TICK_S)
                if _peer(connection)[1] == os.geteuid():
                    socket.send_fds(connection, [b"\0"], [self._memory])

    def leave(self) -> None:
        """Have it closed soon, by the thread that hands it out. Python's collector calls this on any thread, that one too: it takes no lock."""
        self.is_left = True

    def close(self) -> None:
        """Hand it out no more."""
        with self._lock:
            self.is_closed = True
            if self._listening is not None:
                self._listening.shutdown(socket.SHUT_RDWR)  # the address is free once nobody waits there any more
                self._listening.close()
            if self._memory >= 0:
                os.close(self._memory)
            self._listening, self._memory = None, -1

    def _asked_for(self, timeout_s: float) -> int:
        """A descriptor of what another process has filled; -1 if there is none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            pid = 0
            found: list[int] = []
            connection.settimeout(max(timeout_s, 0.001))
            try:
                connection.connect(self._address)
                pid, uid, _ = _peer(connection)
                if uid != os.geteuid():
                    raise StageError(f"Process {pid} of user {uid} stands in for this user's.", "End it, or ask for one replica a node.")
                _, found, _, _ = socket.recv_fds(connection, 1, 1)
            except (ConnectionError, BlockingIOError):
                pass
            except TimeoutError:
                raise self._late(pid) from None
        if not found:  # it has gone, has only begun to listen, is asked by many, or cannot give anything now
            if timeout_s <= 0:
                raise self._late(pid)
            time.sleep(_AGAIN_S)
            return -1
        os.set_inheritable(found[0], False)
        if os.fstat(found[0]).st_size != self._num_bytes or ~fcntl.fcntl(found[0], fcntl.F_GET_SEALS) & _SEALS:
            os.close(found[0])
            raise StageError(f"Process {pid} has handed over other memory than {self._num_bytes:,} bytes of a layer.", "End it.")
        return found[0]

    def _late(self, pid: int) -> StageError:
        what = f"Another process ({pid}) reads {self._num_bytes:,} bytes of a layer for all of this node, and was not done in time."
        return StageError(what, "Look at what it waits for, or end it.")


class Porter:
    """The thread of one process that hands its pieces out as long as there are any."""

    def __init__(self) -> None:
        self._pieces: list[NodeMemory] = []

    def look_after(self, piece: NodeMemory) -> None:
        """Hand this one out too, once it is filled."""
        self._pieces.append(piece)
        if len(self._pieces) == 1:
            threading.Thread(target=_hand_out, args=(self._pieces,), name="packed, handed out", daemon=True).start()

    def close(self) -> None:
        """Hand nothing out any more."""
        for piece in self._pieces:
            piece.close()


def _hand_out(pieces: list[NodeMemory]) -> None:
    while still_there := [piece for piece in pieces if not piece.is_closed]:
        for piece in still_there:
            if piece.is_left:
                piece.close()
        asked = select.poll()
        listening = {piece.listen(): piece for piece in still_there}
        for number in listening.keys() - {-1}:
            asked.register(number, select.POLLIN)
        for number, _ in asked.poll(1000 * _TICK_S):
            listening[number].give()


def _listen(address: str) -> socket.socket | None:
    """A socket there, if there is none."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.setblocking(False)  # whoever asked may have gone before it is answered
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listening


def _allocate(num_bytes: int) -> int:
    """Raises OSError: the system does not give so much."""
    memory = os.memfd_create("m2ray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with ExitStack() as undo:
        undo.callback(os.close, memory)
        os.ftruncate(memory, num_bytes)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        undo.pop_all()
    return memory


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """(process, user, group) at the other end."""
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid, gid
