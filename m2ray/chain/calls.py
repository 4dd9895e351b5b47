"""Calls to a stage, waited for in one way whether one of Ray's actors does them or a thread of this process (here.py)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_here
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError


class CallError(RayError):  # type: ignore[misc]
    """A call in this process failed, as ray.exceptions.RayTaskError says it of an actor's. `cause` is what the stage raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(repr(cause))
        self.cause = cause


def failing_as_calls_do(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a stage's method in this process. Raises CallError with whatever it raises."""
    try:
        return method(*arguments)
    except BaseException as error:
        raise CallError(error) from error


def wait(calls: Sequence[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
    """Those of the calls that are done, at most `num_returns` of them (1, or all), after `timeout` seconds at the latest; and the others."""
    if not isinstance(calls[0], Future):
        ready, others = ray.wait(list(calls), num_returns=num_returns, timeout=timeout)
        return ready, others
    done = wait_here(calls, timeout, FIRST_COMPLETED if num_returns < len(calls) else ALL_COMPLETED).done
    ready = [call for call in calls if call in done][:num_returns]
    return ready, [call for call in calls if call not in ready]


def get(calls: Any, timeout: float) -> Any:
    """What a call gave, or a list of them. Raises RayError as it ended with one, GetTimeoutError after `timeout` seconds."""
    listed = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Future) for call in listed):
        return ray.get(calls, timeout=timeout)
    if not all(call in wait_here(listed, timeout).done for call in listed):
        raise GetTimeoutError(f"A call did not end within {timeout:g} s.")
    answers = [call.result() for call in listed]
    return answers if isinstance(calls, list) else answers[0]
