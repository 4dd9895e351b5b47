"""The process that writes what a GPU's stage captured, beside it: `python -m m2ray.activations.writing.process DESCRIPTOR`, of a socket to the stage.

Its threads ask Python's interpreter for every page, and the stage's own thread, which launches layers, would wait for them. It maps the memory that the
rows lie in, makes writers as the stage asks for them, and calls these for it. It is gone as soon as the stage is.
"""

import gc
import itertools
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from m2ray.activations.schema import encode_tokens
from m2ray.activations.writing.channel import Answer, Call, Channel, Map, Told, Unmap
from m2ray.activations.writing.writer import ActivationWriter  # noqa: TC001 - imported while the stage loads
from m2ray.batches import TOKEN_ROW, CapturedLayer
from m2ray.errors import M2rayError, StageError
from m2ray.shared_memory import Bytes, MappedSlabs, Place

_THREADS = 32
"""That calls wait on. A stage has at most one that submits, and a few each that collect and give up."""

_TICK_S = 0.5
"""How often figures that have changed by themselves are told, and how soon it is seen that the stage is gone whose socket somebody else has too."""

_READ_S = 0.05
"""How long it may be kept from the stage that rows were read: each message takes the interpreter from the thread that launches layers."""


class _Served:
    """What the process has: the stage's slabs, and the writer that was opened last."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._slabs = MappedSlabs()
        self._writers: dict[int, ActivationWriter] = {}
        """By the stage's number for it: one, or none yet."""
        self._calls = ThreadPoolExecutor(_THREADS, thread_name_prefix="call")
        self._news: queue.SimpleQueue[Answer | tuple[int, int]] = queue.SimpleQueue()
        self._lent: dict[tuple[int, int], weakref.ref[Bytes]] = {}

    def take(self, message: Map | Unmap | Call) -> None:
        """What the stage sends, in its order."""
        if isinstance(message, Map):
            self._slabs.map(*message)
        elif isinstance(message, Unmap):
            self._slabs.unmap(message.slab)
        else:
            self._calls.submit(self._answer, self._with_rows(message) if message.method == "submit" else message)

    def tell(self) -> None:
        """Tell the stage what is new, as long as the process lives."""
        told: dict[int, Any] = {}
        while True:
            news = self._gathered()
            figures = {number: writer.figures for number, writer in self._writers.items()}
            answers, read = [each for each in news if isinstance(each, Answer)], [each for each in news if not isinstance(each, Answer)]
            for each in read:
                del self._lent[each]
            if news or figures != told:
                try:
                    self._channel.send(Told(answers, read, figures))
                except OSError:  # the stage is gone
                    os._exit(0)
                told = figures

    def _gathered(self) -> list[Answer | tuple[int, int]]:
        """An answer at once, with what else is new; rows that were read some at a time."""
        news: list[Answer | tuple[int, int]] = []
        until = time.monotonic() + _TICK_S
        with suppress(queue.Empty):
            while True:
                news.append(self._news.get(timeout=max(0.0, until - time.monotonic())))
                until = 0.0 if isinstance(news[-1], Answer) else min(until, time.monotonic() + _READ_S)
        return news

    def _with_rows(self, call: Call) -> Call:
        """The same with the rows themselves. As soon as nothing refers to them any more, whatever a writer did with them, the stage may have their memory back."""
        attempt, micro_batch, captured, timeout_s = call.arguments
        tickets = zip(itertools.repeat(call.number), itertools.count())

        def rows_at(place: Place) -> Bytes:
            rows = self._slabs.rows(place)
            # Python may call this anywhere: it takes no lock, and a SimpleQueue allows for it.
            ticket = next(tickets)
            self._lent[ticket] = weakref.ref(rows, partial(self._let_go, ticket))
            return rows.reshape(place.rows, place.row_bytes)

        layers = [
            CapturedLayer(site, layer, tuple(map(rows_at, columns)), crcs=tuple(rows_at(place).view(np.uint32)[:, 0] for place in crcs))
            for site, layer, columns, crcs in captured
        ]
        return call._replace(arguments=(attempt, micro_batch, layers, timeout_s))

    def _let_go(self, ticket: tuple[int, int], _: "weakref.ref[Bytes]") -> None:
        self._news.put(ticket)

    def _answer(self, call: Call) -> None:
        try:
            answer = Answer(call.number, self._called(call), None)
        except BaseException as error:  # noqa: BLE001 - handed to whoever called, whatever it is
            answer = Answer(call.number, None, _portable(error))
        if answer.error is not None or call.method in ("abandon", "close"):
            gc.collect()  # what failed refers to itself, and to rows
        self._news.put(answer)

    def _called(self, call: Call) -> Any:
        if call.method == "open":
            spec, parts = call.arguments
            self._writers = {call.writer: spec.open(parts)}
            return None
        writer = self._writers.get(call.writer)
        if writer is None:
            raise StageError("Another writer has taken this one's place.", "This is a defect of m2ray.")
        return getattr(writer, call.method)(*call.arguments)


def _portable(error: BaseException) -> BaseException:
    """An error as the stage gets it: its words. The user's errors are all made to be; where in m2ray another comes from is in the stage's log."""
    if not isinstance(error, M2rayError):
        traceback.print_exception(error)
    try:
        found: BaseException = pickle.loads(pickle.dumps(error.with_traceback(None)))  # noqa: S301 - its own
    except Exception:  # noqa: BLE001 - whatever a library's error does not take
        return StageError(f"Rows were not written: {error!r}.", "This is a defect of m2ray.")
    return found


def main(descriptor: int) -> None:
    """Serve the stage at the other end until that is gone."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what a whole group gets is for the stage to act on
        signal.signal(each, signal.SIG_IGN)
    stage = os.getppid()
    channel = Channel(socket.socket(fileno=descriptor))
    served = _Served(channel)
    threading.Thread(target=served.tell, name="tell", daemon=True).start()
    encode_tokens(np.zeros(1, TOKEN_ROW))  # pyarrow's first one takes a quarter of a second, for which the first rows would wait
    code = 1
    try:
        while os.getppid() == stage:
            message = channel.receive(_TICK_S)
            if message is not None:
                served.take(message)
    except (EOFError, ConnectionError):
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, no thread may outlive it
        traceback.print_exc()
    os._exit(code)  # at once, as the stage's own threads have ended


if __name__ == "__main__":
    main(int(sys.argv[1]))
