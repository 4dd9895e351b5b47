"""Chat templates are programs of strangers: they run in a process of their own, with limits of time, memory and output for each row."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from m2ray.prompts.memory import RENDER_BYTES, limit_process
from m2ray.prompts.rows import MAX_PROMPT_BYTES, PromptRow

_ROWS_AT_ONCE = 64
_BYTES_AT_ONCE = 1 << 20
_SLOWDOWN, _PAUSE_S = 10, 60.0
"""How much slower than its processor time a busy machine may be, and what else it may take, before the process counts as hung."""

_LONGEST_POLL_S = 2_000_000
"""The system counts a poll's milliseconds by 31 bits."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat's text, and where in it things are, [start, stop) in characters, ascending.

    Attributes:
        text: what the template writes.
        answers: what the assistant says; None where nobody asked.
        messages: each message with its role; None where that is not known, or nobody asked.
        is_tagged: whether the template itself marks the answers.
    """

    text: str
    answers: list[tuple[int, int]] | None = None
    messages: list[tuple[str, int, int]] | None = None
    is_tagged: bool = False


Render = Callable[[PromptRow], Rendered]


class RefusedError(ValueError):
    """The reason why a row cannot be rendered."""


class Renderer:
    """The process in which rows are rendered: a copy of this one (fork), so that it knows tokenizer and template at once.

    The kernel ends it once a row has taken its processor time; another one then goes on behind that row. Time is the processor's, so that the
    same rows are refused on a busy machine. Used by one thread.
    """

    def __init__(self, render: Render, timeout_s: float) -> None:
        self._render = render
        self._timeout_s = timeout_s
        self._process: Any = None
        self._connection: Connection | None = None

    def rendered(self, rows: Sequence[PromptRow]) -> Iterator[Rendered | RefusedError]:
        """What is made of each row, or why nothing is."""
        done = alone_until = 0
        while done < len(rows):
            asked = rows[done : done + (1 if done < alone_until else _num_at_once(rows[done:]))]
            answers = self._ask(asked)
            if answers is not None:
                yield from answers
                done += len(answers)
            elif len(asked) > 1:
                alone_until = done + len(asked)  # one of them ended the process, or cannot be handed to it: each is tried by itself
            else:
                yield self._why_it_ended()
                done += 1

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._connection is not None
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None

    def _ask(self, rows: Sequence[PromptRow]) -> list[Rendered | RefusedError] | None:
        """The answers for the first of the rows, one at least; None if the process ended or hangs, or one of several cannot be handed to it."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(rows)
            if self._connection.poll(min(_PAUSE_S + _SLOWDOWN * self._timeout_s * len(rows), _LONGEST_POLL_S)):
                answers: list[Rendered | RefusedError] = self._connection.recv()
                return answers
        except RecursionError:  # pickle goes half as deep as JSON; nothing was sent
            return None if len(rows) > 1 else [RefusedError("nested too deeply to be handed to the chat template")]
        except (EOFError, OSError):
            pass
        else:
            self._process.kill()
        self._process.join()  # its exit code says why
        return None

    def _why_it_ended(self) -> RefusedError:
        if self._process.exitcode == -signal.SIGPROF:
            return RefusedError(f"the chat template took longer than template_timeout_s = {self._timeout_s:g}")
        return RefusedError(f"the chat template ended its process (exit code {self._process.exitcode})")

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, self._render, self._timeout_s), daemon=True)
        with warnings.catch_warnings():
            # Newer Pythons warn of a fork beside threads: whatever lock those hold, rendering takes none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()


def _num_at_once(rows: Sequence[PromptRow]) -> int:
    """How many rows go through the pipe together: it saves most of what a process of its own costs."""
    num_bytes = 0
    for number, row in enumerate(rows[:_ROWS_AT_ONCE]):
        num_bytes += row.num_bytes
        if num_bytes > _BYTES_AT_ONCE:
            return max(number, 1)
    return min(len(rows), _ROWS_AT_ONCE)


def _serve(connection: Connection, parents: Connection, render: Render, timeout_s: float) -> None:
    """The process: rows in, chats out, until nobody asks any more. Of many long texts only the first are given at once."""
    parents.close()  # else this process would never learn that the other one is gone
    _be_silent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for ends in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(ends, signal.SIG_DFL)
    limit_process(RENDER_BYTES)
    while True:
        try:
            rows = connection.recv()
        except EOFError:
            return
        answers: list[Rendered | RefusedError] = []
        while len(answers) < len(rows) and sum(len(chat.text) for chat in answers if isinstance(chat, Rendered)) < MAX_PROMPT_BYTES:
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            answers.append(_rendered(render, rows[len(answers)]))
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answers)


def _be_silent() -> None:
    """What it prints if it crashes, a trace for one, says nothing of a run that goes on: that the row is quarantined is said by its reason."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of C code, and of Python's that is not sent elsewhere
        os.dup2(nothing, stream)
    sys.stdout = sys.stderr = os.fdopen(nothing, "w")


def _rendered(render: Render, row: PromptRow) -> Rendered | RefusedError:
    try:
        chat = render(row)
        num_bytes = len(chat.text.encode("utf-8", "surrogatepass"))
    except RefusedError as refused:
        return RefusedError(str(refused))
    except MemoryError:
        return RefusedError(f"the chat template takes more than {RENDER_BYTES:,} bytes of memory")
    if num_bytes > MAX_PROMPT_BYTES:
        return RefusedError(f"the chat template makes {num_bytes} bytes of it, more than {MAX_PROMPT_BYTES}")
    return chat
