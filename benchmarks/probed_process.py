"""The process that writes a stage's rows, as benchmarks/stage_as_actor.py starts it: m2ray's own, which also tells what each of its threads did when."""

import sys
import threading
import time
from collections import deque
from typing import Any, NamedTuple

from m2ray.activations.writing import attempt, process
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.storage.hashing import HashingFile


class Event(NamedTuple):
    """What a thread did, from when to when by time.monotonic, and how long it was at work itself."""

    thread: str
    what: str
    began: float
    ended: float
    cpu_s: float


events: deque[tuple[str, str, float, float, float]] = deque(maxlen=20_000)


def clock(owner: Any, name: str) -> None:
    """Note each call of a method or function."""
    work = getattr(owner, name)

    def clocked(*arguments: Any, **options: Any) -> Any:
        began, cpu = time.monotonic(), time.thread_time()
        try:
            return work(*arguments, **options)
        finally:
            events.append((threading.current_thread().name, name, began, time.monotonic(), time.thread_time() - cpu))

    setattr(owner, name, clocked)


def timeline(_: ActivationWriter) -> list[tuple[str, str, float, float, float]]:
    """What was noted since the last time, the oldest first."""
    found = sorted(events, key=lambda event: event[2])
    events.clear()
    return found


def main() -> None:
    for owner, name in (
        (ActivationWriter, "submit"),
        (ActivationWriter, "collect"),
        (PartWriter, "append"),
        (PartWriter, "seal"),
        (PartWriter, "finish"),
        (HashingFile, "write_pieces"),
        (attempt, "encode_tokens"),
    ):
        clock(owner, name)
    probed: Any = ActivationWriter
    probed.timeline = timeline
    process.main(int(sys.argv[1]))


if __name__ == "__main__":
    main()
