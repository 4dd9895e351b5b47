"""A writer in a process beside the stage's, as the stage sees it: for a GPU's, whose thread that launches layers needs Python's interpreter for itself."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from operator import add
from typing import Any

import numpy as np

from m2ray.activations.writing.backlog import Figures
from m2ray.activations.writing.channel import Call, Channel, Map, Told, Unmap
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt, PartSpec
from m2ray.errors import StageError, StoreError
from m2ray.shared_memory import Place, SharedMemory

_OPEN_S = 120.0
"""To start, which is to import pyarrow and what else writes, and to open the store."""

_LOOK_S = 600.0
"""How long the thread that listens sleeps where nothing comes."""

_GRACE_S = 30.0
"""How much later than its own limit a call may answer."""


_MODULE = "m2ray.activations.writing.process"
"""That it runs."""


class _Process:
    """One such process, from its start to its end. Any thread may call.

    Attributes:
        figures: of each of its writers, as it told last.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # As this one finds its modules; and a group of its own, since what a terminal or Slurm sends a group is for the stage to act on.
        command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=found, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._channel = Channel(ours)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._awaited: dict[int, Future[Any]] = {}
        self._read_there: dict[tuple[int, int], Bits] = {}
        self._mapped: set[int] = set()
        self._ended = ""
        """How, in words."""
        self.figures: dict[int, Figures] = {}
        threading.Thread(target=self._listen, name="writer beside", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._ended

    def open(self, writer: int, spec: WriterSpec, parts: Sequence[PartSpec], memory: SharedMemory) -> None:
        """Raises as WriterSpec.open, and StoreError: it has ended."""
        for slab in memory.slabs:
            self._map(slab.number, slab.descriptor)
        self.call(writer, "open", (spec, tuple(parts)), _OPEN_S)

    def submit(
        self, writer: int, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float, memory: SharedMemory
    ) -> None:
        """As ActivationWriter.submit. What was captured is held until nobody reads it there any more."""
        arrays: list[Bits] = []

        def place_of(rows: Bits) -> Place:
            slab, place = memory.place(rows)
            if slab is not None:
                self._map(slab.number, slab.descriptor)
            arrays.append(rows)
            return place

        layers = [
            (
                layer.site,
                layer.layer,
                [*map(place_of, layer.columns)],
                [place_of(each.view(np.uint8).reshape(-1, 4)) for each in layer.crcs],
            )
            for layer in captured
        ]
        self.call(writer, "submit", (attempt, micro_batch, layers, timeout_s), timeout_s, arrays)

    def call(self, writer: int, method: str, arguments: tuple[Any, ...], timeout_s: float, held: Sequence[Bits] = ()) -> Any:
        """What a method of a writer there gives, or raises. Raises StoreError: the process has ended, or does not answer, and is ended therefore."""
        answer: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise self._error()
            number = next(self._numbers)
            self._awaited[number] = answer
            self._read_there |= {(number, index): rows for index, rows in enumerate(held)}
        late = ""
        try:
            self._channel.send(Call(number, writer, method, arguments))
            answer.exception(timeout_s + _GRACE_S)
        except (TimeoutError, BlockingIOError):
            late = f"did not answer within {timeout_s + _GRACE_S:g} s, and was killed therefore"
        except OSError:  # it has ended by itself
            pass
        if not answer.done():
            self._note_end(late)
            self._process.kill()
            self._end()
        return answer.result()

    def _map(self, slab: int, descriptor: int) -> None:
        if slab not in self._mapped:
            with suppress(OSError):  # it has ended, which the call tells that comes next
                self._channel.send(Map(slab, descriptor))
            self._mapped.add(slab)

    def unmap(self, slab: int) -> None:
        """A slab is handed over no more."""
        if slab in self._mapped:
            self._mapped.remove(slab)
            with suppress(OSError):  # it has ended, and maps nothing
                self._channel.send(Unmap(slab))

    def _listen(self) -> None:
        """Take what it tells until it ends."""
        with suppress(EOFError, OSError):
            while True:
                told = self._channel.receive(_LOOK_S)
                if told is not None:
                    self._take(told)
        self._end()

    def _take(self, told: Told) -> None:
        self.figures = told.figures
        with self._lock:
            for ticket in told.read:
                self._read_there.pop(ticket, None)
            answers = [(self._awaited.pop(each.number, None), each) for each in told.answers]
        for awaited, answer in answers:
            if awaited is None:
                continue
            if answer.error is None:
                awaited.set_result(answer.result)
            else:
                awaited.set_exception(answer.error)

    def _end(self) -> None:
        """It has ended, or does so now: tell all that wait for it."""
        try:
            how = _in_words(self._process.wait(_GRACE_S))
        except subprocess.TimeoutExpired:
            how = "does not end"
        self._note_end(how)
        with self._lock:
            awaited = list(self._awaited.values())
            self._awaited.clear()
            self._read_there.clear()
        for each in awaited:
            each.set_exception(self._error())

    def _note_end(self, how: str) -> None:
        """From now on it has ended: the first to tell why is right."""
        with self._lock:
            self._ended = self._ended or how

    def _error(self) -> StoreError:
        return StoreError(
            f"The process {self._process.pid} that writes this stage's rows {self._ended}.",
            "If it was killed, the system's log tells whether memory was too little; else the stage's log has its last words.",
        )

    def close(self) -> None:
        """End it: it sees that nobody is there any more."""
        with suppress(OSError):
            self._channel.close()
        self._end()


class Beside:
    """The process beside a stage, which writes for one job after the other. Where it has ended, the next writer, or the next attempt, has a new one.

    Attributes:
        memory: which it maps; rows that are submitted lie there.
    """

    def __init__(self) -> None:
        self.memory = SharedMemory(self._unmap)
        self._lock = threading.Lock()
        self._writers = itertools.count()
        self._process: _Process | None = None

    def start(self) -> _Process:
        """The process that is at work: it takes a moment before it answers. Raises StageError: the system starts none."""
        with self._lock:
            if self._process is None or not self._process.is_alive:
                try:
                    self._process = _Process()
                except OSError as error:
                    what = f"The process that writes a stage's rows cannot be started: {error.strerror}."
                    raise StageError(what, "Allow for more processes and open files (ulimit -u, -n), or free memory.") from error
            return self._process

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none yet."""
        process = self._process
        return None if process is None else process.pid

    def open(self, spec: WriterSpec, parts: Sequence[PartSpec]) -> "WriterBeside":
        """A writer there; the one before it is closed. Raises as WriterSpec.open, and StoreError: the process does not start."""
        return WriterBeside(self, next(self._writers), spec, parts)

    def _unmap(self, slab: int) -> None:
        """At once: the next job's memory is taken before its writer is opened, and there may be no room for both."""
        process = self._process
        if process is not None:
            process.unmap(slab)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.close()


class WriterBeside:
    """As ActivationWriter. One thread submits; any may collect, abandon or look at the figures."""

    threads: Sequence[ThreadPoolExecutor] = ()

    def __init__(self, beside: Beside, number: int, spec: WriterSpec, parts: Sequence[PartSpec]) -> None:
        self._beside, self._number, self._spec, self._parts = beside, number, spec, tuple(parts)
        self._lock = threading.Lock()
        self._process: _Process | None = None
        """In which it is open."""
        self._before = Figures()
        self._attempts: dict[tuple[int, str], _Process] = {}
        """Where each was begun: what of it was in a process that has ended is lost."""
        self._is_closed = False
        self._open()

    def submit(self, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float) -> None:
        """As ActivationWriter.submit, of rows in shared memory: that is free for others once nobody refers to them here or there."""
        if self._is_closed:
            raise StageError("The writer is closed.", "This is a defect of m2ray.")
        process = self._attempts.get((micro_batch.shard, attempt)) or self._open()
        self._attempts[micro_batch.shard, attempt] = process
        process.submit(self._number, attempt, micro_batch, captured, timeout_s, self._beside.memory)

    def collect(self, shard: int, attempt: str, timeout_s: float) -> tuple[PartReceipt, ...]:
        """As ActivationWriter.collect."""
        process = self._attempts.pop((shard, attempt), None) or self._open()
        # A shard that is late is aborted within the same time again.
        receipts: tuple[PartReceipt, ...] = process.call(self._number, "collect", (shard, attempt, timeout_s), 2 * timeout_s)
        return receipts

    def abandon(self, attempts: Iterable[tuple[int, str]], timeout_s: float = 60.0) -> None:
        """As ActivationWriter.abandon. What a process that has ended has left is no commit's, and goes when the run is finished."""
        attempts = tuple(attempts)
        for each in attempts:
            self._attempts.pop(each, None)
        self._let_go("abandon", (attempts, timeout_s), timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """As ActivationWriter.close."""
        try:
            self._let_go("close", (timeout_s,), timeout_s)
        finally:
            self._is_closed = True

    def _let_go(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> None:
        process = self._process
        if process is not None and process.is_alive and not self._is_closed:
            process.call(self._number, method, arguments, timeout_s)

    @property
    def figures(self) -> Figures:
        """How far it is, as the process told last: it does twice a second, and with each answer."""
        told = Figures() if self._process is None else self._process.figures.get(self._number, Figures())
        return Figures(*map(add, self._before, told))

    def _open(self) -> _Process:
        """The process that it is open in; a new one where that has ended."""
        with self._lock:
            process = self._beside.start()
            if process is not self._process:
                process.open(self._number, self._spec, self._parts, self._beside.memory)
                self._before, self._process = self.figures._replace(queued_bytes=0), process
            return process


def _in_words(code: int) -> str:
    """How a process ended."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"has ended by itself with code {code}"
