"""Channel: pickled messages, and descriptors with them, between a stage and the process that writes its rows; and what they tell each other."""

import pickle
import select
import socket
import struct
import threading
from typing import Any, NamedTuple

from m2ray.activations.writing.backlog import Figures

_HEADER = struct.Struct("<Q")
_RECEIVED_BYTES = 1 << 18
SEND_S = 60
"""How long the other side may leave what it is sent unread."""


class Map(NamedTuple):
    """To the process: a slab, and what it is mapped by: in each process its own descriptor of the same memory."""

    slab: int
    descriptor: int


class Unmap(NamedTuple):
    """To the process: a slab that is handed over no more."""

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
    """One end of a connection. Any thread may send, one receives.

    Each call of the system gives Python's interpreter away, and the stage's thread that launches layers waits for it after: a message takes one.
    """

    def __init__(self, connection: socket.socket) -> None:
        # Of the system's own: Python's would hold for what is received too, which comes when it comes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        self._connection = connection
        self._sending = threading.Lock()
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._received = bytearray()
        self._descriptors: list[int] = []

    def send(self, message: Map | Unmap | Call | Told) -> None:
        """Raises OSError: the other side is gone, or has not read for long."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        data = _HEADER.pack(len(data)) + data
        with self._sending:
            sent = socket.send_fds(self._connection, [data], [message.descriptor] if isinstance(message, Map) else [])
            if sent < len(data):
                self._connection.sendall(memoryview(data)[sent:])

    def receive(self, timeout_s: float) -> Any:
        """The next message, or None if none has come. Raises EOFError or OSError: the other side is gone."""
        while (message := self._next()) is None:
            if not self._readable.poll(1000 * timeout_s):
                return None
            data, descriptors, _, _ = socket.recv_fds(self._connection, _RECEIVED_BYTES, 1)
            if not data:
                raise EOFError
            self._received += data
            self._descriptors += descriptors
        return message

    def _next(self) -> Any:
        """The first message of what was received, if all of it is there."""
        if len(self._received) < _HEADER.size:
            return None
        end = _HEADER.size + _HEADER.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message = pickle.loads(memoryview(self._received)[_HEADER.size : end])  # noqa: S301 - of a process that this one started, or that started it
        self._received = self._received[end:]
        return message._replace(descriptor=self._descriptors.pop(0)) if isinstance(message, Map) else message

    def close(self) -> None:
        """The other side, and a thread that receives here, find that this one is gone."""
        self._connection.shutdown(socket.SHUT_RDWR)
