"""Turns: what the threads of one stage agree on, in which order micro-batches enter and what went wrong first.

A micro-batch's turn is its right to enter the stage: those of an epoch get it one after the other, in the order of their steps. Work
belongs to an epoch, and the chain begins another one after every failure. A wait for something of an epoch that is over, or has failed,
ends with `Superseded`: its result is of no use any more.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames

from ray.exceptions import GetTimeoutError


class Superseded(Exception):  # noqa: N818 - it ends work that is of no use any more, and is no error
    """The epoch that the work belongs to is over, or has failed."""


def _let_go(error: BaseException | None) -> None:
    """Drop what the work that failed had in its hands: its frames hold it as long as somebody has the error, and what is tried next needs the room."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__


class _Epoch:
    """One epoch: whose turn it is, how many micro-batches are done, and the first failure."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.next_step = 0
        self.done = 0
        self.failure: BaseException | None = None


class Turns:
    """The epoch of a stage, the steps of its micro-batches, and the first failure. Any thread may call.

    Args:
        epoch: counts the failures after which the chain went on.
    """

    def __init__(self, epoch: int) -> None:
        self.changed = threading.Condition()
        self._now = _Epoch(epoch)

    @property
    def epoch(self) -> int:
        return self._now.number

    @property
    def done(self) -> int:
        """Micro-batches of this epoch whose rows are with the writer: they come in order."""
        return self._now.done

    def begin(self, epoch: int) -> None:
        """Begin an epoch: steps count from 0 again, and waits for something of an earlier one end."""
        with self.changed:
            self._now = _Epoch(epoch)
            self.changed.notify_all()

    def fail(self, epoch: int, error: BaseException) -> None:
        """Keep the first failure of an epoch, unless the epoch is over."""
        with self.changed:
            if epoch == self.epoch and self._now.failure is None:
                self._now.failure = error
                self.changed.notify_all()

    def finish_step(self, epoch: int) -> None:
        """Note that one more micro-batch is done."""
        with self.changed:
            if epoch == self.epoch:
                self._now.done += 1
                self.changed.notify_all()

    def wait(self, epoch: int, is_ready: Callable[[], object], timeout_s: float, what: str) -> None:
        """Wait until `is_ready()`, which is asked whenever something changed.

        Raises:
            Superseded: the epoch is over or has failed.
            GetTimeoutError: `timeout_s` went by; it says for `what`.
        """
        with self.changed:
            came = self.changed.wait_for(lambda: self._is_over(epoch) or is_ready(), timeout_s)
            self.require(epoch)
            if not came:
                raise GetTimeoutError(f"A stage waited {timeout_s:g} s for {what}.")  # as a call that hangs, which is tried again

    def require(self, epoch: int) -> None:
        """Raise Superseded if the epoch is over or has failed."""
        with self.changed:
            if self._is_over(epoch):
                raise Superseded

    @contextmanager
    def guarded(self, epoch: int) -> Iterator[None]:
        """Keep an error for `watch`: nobody waits for the end of this work."""
        try:
            yield
        except Superseded:
            return
        except BaseException as error:  # noqa: BLE001 - handed to the driver, whatever it is
            _let_go(error)
            self.fail(epoch, error)

    @contextmanager
    def turn(self, epoch: int, step: int, timeout_s: float) -> Iterator[None]:
        """Hold the turn of `step`: steps take theirs one after the other, from 0 on without gaps.

        Raises as `wait` does, if no other step takes its turn for `timeout_s`.
        """
        with self.changed:
            self.require(epoch)
            while (first := self._now.next_step) != step:
                self.wait(epoch, lambda: self._now.next_step != first, timeout_s, f"micro-batch {first}, which comes before {step}")
        yield
        with self.changed:
            if epoch == self.epoch:
                self._now.next_step += 1
                self.changed.notify_all()

    def watch(self, epoch: int, timeout_s: float) -> None:
        """Raise what an epoch failed with as soon as it does; return when it is over, or after `timeout_s`."""
        with self.changed:
            self.changed.wait_for(lambda: self._is_over(epoch), timeout_s)
            if epoch == self.epoch and self._now.failure is not None:
                raise self._now.failure

    def _is_over(self, epoch: int) -> bool:
        return epoch != self.epoch or self._now.failure is not None
