"""What imports, and opening and loading a checkpoint, ask of Python's interpreter for a second or two: many small objects, many threads."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_S = 2e-4
_LOCK = threading.Lock()
_usual_s: list[float] = []
"""The interval as it was, for each that wants quick switches now: several threads may."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Without Python's garbage collector: thousands of small objects call it, and it looks through all of torch's and transformers' each time.

    To open MiniMax-M2's 96,103 tensors takes 2.0 s with it and 0.6 s without (2 CPU cores).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around the imports of torch and transformers, for a program of m2ray's own: without the collector, which then never looks at what they made.

    Nor at anything else that is there, to the program's end: in a user's process that would keep his models, which often hold themselves.

    They take 3.8 instead of 5.0 s of CPU time, and the look at options, model and prompts after them 0.6 instead of 1.5. Python's end, which
    calls the collector once more, takes 0.2 instead of 1.2. Where all is imported already, what is there may be somebody else's and go.
    """
    known = len(sys.modules)
    with without_collector():
        yield
        if len(sys.modules) > known:
            gc.freeze()


@contextmanager
def quick_switches() -> Iterator[None]:
    """With quick switches between threads: a reader that is back from the disk waits up to 5 ms (Python's default) for the thread that plans.

    Sixteen readers beside a busy thread did 0.38 of their work with 5 ms, and 0.84 with 0.2 ms (2 CPU cores, reads of 8 ms simulated). So does
    a thread that computes, which asks for the interpreter again after each operation of a layer. Until the last of several is left.
    """
    with _LOCK:
        _usual_s.append(_usual_s[-1] if _usual_s else sys.getswitchinterval())
        sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        with _LOCK:
            usual_s = _usual_s.pop()
            if not _usual_s:
                sys.setswitchinterval(usual_s)
