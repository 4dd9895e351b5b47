"""SIGTERM, which `ray job stop` and Slurm send, and SIGHUP, which a closed terminal sends: the run is asked to stop instead of being ended
where it stands.
"""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from m2ray.errors import StageError

NOTHING_WRITTEN = "Nothing was written: the same command begins from the start."
NOTHING_YET = "Nothing was written by now: run the same command again."
GOES_ON = "Run the same command again: finished shards are kept."


_handler_of, _set_handler = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
"""The system's own handlers, which any thread may ask for and set."""
_handler_of.argtypes, _handler_of.restype = [ctypes.c_int], ctypes.c_void_p
_set_handler.argtypes, _set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p


class Stop:
    """Whether the run was asked to stop: `asked` is set then, and what goes on inside of `at_once` ends there."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._outlived: StageError | None = None
        self._ends_at_once = False

    @contextmanager
    def at_once(self, remedy: str) -> Iterator[None]:
        """Around what may be broken off anywhere.

        Raises:
            StageError: the run was asked to stop, by now or before.
            KeyboardInterrupt: it was Ctrl-C; with `remedy`, where no run was claimed yet. Elsewhere whoever says it knows what is kept.
        """
        self._ends_at_once = True
        try:
            if self.asked.is_set():
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            if not self.asked.is_set():  # it was Ctrl-C
                raise KeyboardInterrupt(*([] if remedy == GOES_ON else [remedy])) from None
        finally:
            self._ends_at_once = False
        if self.asked.is_set():
            raise self.error(remedy)

    def outlived(self, why: str) -> None:
        """Ask the run to stop, from any thread: another driver has taken it over. It ends by itself, with an error that says so."""
        self._outlived = StageError(why, "What this one committed is kept; `m2ray inspect` shows how far the run is.")
        self.asked.set()

    def error(self, remedy: str) -> StageError:
        """What a run that was asked to stop ends with."""
        return self._outlived or StageError("The run was stopped on request.", remedy)

    def ask(self, *_: object) -> None:
        """The handler of the signal, in the main thread."""
        signal.alarm(0)  # while Ray is started by another thread its own handler comes first, which aborts the process 3 s after the signal
        self.asked.set()
        if self._ends_at_once:
            self._ends_at_once = False  # a second signal does not break off what is done on the way out
            raise KeyboardInterrupt  # the only exception that goes through Ray's waits


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """A stop that SIGTERM asks for, and SIGHUP unless it is ignored, as nohup has it. Outside of the main thread, which alone gets signals,
    nobody asks for it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if one is signal.SIGTERM or signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop.ask) for one in heard}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around what has to be ended as a whole on the way out: another Ctrl-C does not break it off, and is forgotten."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around ray.init, which sets a handler that ends the process without a word: put the handler of before back."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # where Ray's own code in C++ sets it all the same, below Python's
        handler = _handler_of(signal.SIGTERM)
        try:
            yield
        finally:
            _set_handler(signal.SIGTERM, handler)
        return
    if not callable(before):
        yield
        return
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def spared_by_hangup() -> Iterator[None]:
    """Around the start of Ray's processes: a closed terminal's SIGHUP, which all of its group get, is none to them. They inherit this thread's mask.

    Else Ray is gone before the run has stopped in order, and whoever waits for an answer of it waits for a minute.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGHUP}
        )  # may raise what a signal that came before raises, and has blocked it then
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
