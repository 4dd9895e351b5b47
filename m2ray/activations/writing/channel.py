"""Channel: pickled messages, and descriptors with them, between a stage and the process that writes its rows; and what they tell each other."""

import pickle
import socket
import struct
import threading
from typing import Any, NamedTuple

from m2ray.activations.writing.backlog import Figures

_HEADER = struct.Struct("<Q")
SEND_S = 60
"""How long the other side may leave what it is sent unread."""


class Map(NamedTuple):
    """To the process: a slab, whose descriptor comes with it."""

    slab: int


class Call(NamedTuple):
    """To the process: a method of one of its writers; "open" makes it. Rows are the Places where they lie."""

    number: int
    writer: int
    method: str
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """What a call came to."""

    number: int
    result: Any
    error: BaseException | None


class Told(NamedTuple):
    """From the process.

    Attributes:
        answers: to calls.
        read: of calls whose rows nothing there refers to any more, one entry for each of their arrays: the call's number and the array's.
        figures: of each writer, by now.
    """

    answers: list[Answer]
    read: list[tuple[int, int]]
    figures: dict[int, Figures]


class Channel:
    """One end of a connection. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        # Of the system's own: Python's would hold for what is received too, which comes when it comes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Any, descriptor: int | None = None) -> None:
        """Raises OSError: the other side is gone, or has not read for long."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            socket.send_fds(self._connection, [_HEADER.pack(len(data))], [] if descriptor is None else [descriptor])
            self._connection.sendall(data)

    def receive(self) -> tuple[Any, list[int]]:
        """The next message, and the descriptors that came with it. Raises EOFError: the other side is gone."""
        header, descriptors, _, _ = socket.recv_fds(self._connection, _HEADER.size, 1, socket.MSG_WAITALL)
        data = bytearray(_HEADER.unpack(header)[0] if len(header) == _HEADER.size else 0)
        left = memoryview(data)
        while left:
            count = self._connection.recv_into(left)
            left = left[count:] if count else _gone()
        return (pickle.loads(data), descriptors) if data else _gone()  # noqa: S301 - of a process that this one started, or that started it

    def close(self) -> None:
        """The other side, and a thread that receives here, find that this one is gone."""
        self._connection.shutdown(socket.SHUT_RDWR)


def _gone() -> Any:
    raise EOFError
