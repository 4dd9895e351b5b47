"""A chain of one stage in the driver's own process, without Ray: for one machine without GPUs (docs/decisions/one-process.md).

The stage is the same StageActor, and everything above it is the same; what differs is who calls it: threads of this process, as many for each
of its concurrency groups as Ray would have.
"""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import ray
import torch

from m2ray.chain.actor import StageActor, concurrency_groups
from m2ray.chain.calls import failing_as_calls_do
from m2ray.chain.machine import probe_node
from m2ray.chain.probing import Hardware
from m2ray.chain.status import StageStatus
from m2ray.chain.stopping import GOES_ON
from m2ray.chain.wave import most_in_chain
from m2ray.config import ExtractConfig
from m2ray.errors import StageError
from m2ray.model.stage import StageSpec
from m2ray.planning.hardware import Cluster

NODE = "127.0.0.1"
"""What a Ray of this machine alone calls it."""

_ONE_STAGE = threading.Lock()
"""Of the run that has its stage in this process."""

_LEAVE_S = 1.0
_END_S = 10.0
"""What a stage's threads may take to end: before others are told that it has ended, and once the program itself is at its end."""


def hardware_here(config: ExtractConfig, folder: str, stack: ExitStack) -> Hardware | None:
    """This machine until the stack ends, where it is all that the run asks for: one stage, no GPU, no cluster, and no other run of this process has
    its stage here, whose number of torch threads, on which bits rest, is the process's. None where Ray has to be asked.

    Args:
        folder: whose disk's free bytes are asked for.
    """
    if needs_cluster(config):
        return None
    node = probe_node(NODE, folder)
    if node.gpus or not _ONE_STAGE.acquire(blocking=False):
        return None
    stack.callback(_ONE_STAGE.release)
    return Hardware(Cluster((node,)), {NODE: ""}, {NODE: float(node.cpus or 1)}, is_here=True)


def needs_cluster(config: ExtractConfig) -> bool:
    """Whether Ray is needed whatever this machine has."""
    alone = config.stages in ("auto", 1) and config.replicas in ("auto", 1) and config.node_labels is None and config.chain is None
    return config.ray or not alone or bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


class ActorHere:
    """A StageActor behind the calls of a Ray actor's handle: `actor.METHOD.remote(...)` gives a Future."""

    def __init__(self, specs: Sequence[StageSpec], timeout_s: float, epoch: int) -> None:
        self._actor = StageActor(specs, transport="object_store", timeout_s=timeout_s, epoch=epoch)
        groups = concurrency_groups(most_in_chain([specs]) + 2)
        self._threads = {group: ThreadPoolExecutor(count, group) for group, count in groups.items()}

    def __getattr__(self, name: str) -> "_Method":
        method = getattr(self._actor, name)
        return _Method(self._threads[method.__ray_concurrency_group__], method)

    def end(self) -> None:
        """End its threads, and wait until each has done what it is at."""
        self._actor.leave()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for threads in (*self._threads.values(), *self._actor.threads):
            threads.shutdown()


class _Method:
    """A method of the stage, called on one of its group's threads."""

    def __init__(self, threads: ThreadPoolExecutor, method: Any) -> None:
        self._threads = threads
        self._method = method

    def options(self, **_: Any) -> "_Method":
        """Ray's options are about what travels between processes."""
        return self

    def remote(self, *arguments: Any) -> "Future[Any]":
        return self._threads.submit(failing_as_calls_do, self._method, *arguments)


class ActorsHere:
    """The one stage of a chain in this process. The arguments are those of Stages."""

    def __init__(self, specs: Sequence[Sequence[StageSpec]], timeout_s: float) -> None:
        self._specs = specs
        self._timeout_s = timeout_s
        self._threads_before = torch.get_num_threads()
        self.handles: list[Any] = []

    def start(self, epoch: int) -> None:
        """Start it, in the epoch that the chain is in."""
        self.handles = [ActorHere(specs, self._timeout_s, epoch) for specs in self._specs]

    def restart(self, lost: Mapping[int, StageStatus | None], _epoch: int) -> bool:
        """A thread that hangs cannot be ended, unlike a process, and goes on with what it has in its hands: the run ends, and `end` sees to the rest.

        Raises:
            StageError: always.
        """
        raise StageError(
            f"The stage stands still for {self._timeout_s:g} s: {len(lost)} of 1 does not answer, and it shares this process.",
            f"Look at what it waits for (the model's disk or bucket, the output's). {GOES_ON} With ray = true a stage is a process of its own, which is restarted.",
        )

    def end(self) -> None:
        """End it for good, from any thread. One that hangs is left behind, and does not outlive the program."""
        leaving = threading.Thread(target=lambda: [actor.end() for actor in self.handles], name="end of a stage", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)
        if leaving.is_alive():
            _end_with_the_program(leaving)
        torch.set_num_threads(self._threads_before)


def _end_with_the_program(leaving: threading.Thread) -> None:
    """End the process soon after its program, though `leaving` goes on: Python waits at its end for every thread, and so for ever for one that hangs."""
    is_at_its_end = threading.Event()
    # The main thread counts as alive while Python waits for those of pools, and atexit comes after that.
    threading._register_atexit(is_at_its_end.set)  # type: ignore[attr-defined]  # noqa: SLF001

    def end() -> None:
        while leaving.is_alive() and not is_at_its_end.wait(_LEAVE_S):
            pass
        leaving.join(_END_S)
        if leaving.is_alive():
            with suppress(OSError, ValueError):  # nobody reads on
                sys.stdout.flush()
            os._exit(1)

    threading.Thread(target=end, name="end of a stage that hangs", daemon=True).start()
