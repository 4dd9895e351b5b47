"""Several chains over one prompt set: each runs on a thread of its own and takes shards from one queue.

A replica that cannot go on gives its shards back, and the others do them. The run ends when the last one is gone.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from m2ray.batches import Shard
from m2ray.chain.driver import Chain, ChainLostError, ShardAttempt
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.chain.stopping import GOES_ON, Stop
from m2ray.errors import ClusterError, StoreError

_TICK_S = 0.5
_FLUSH_S = 2.0
_JOIN_S = 10.0


class Replicas:
    """The chains and what they hand over. A context: at its end every actor is gone."""

    def __init__(self, chains: Sequence[tuple[Chain, Stages]], shards: Sequence[Shard], stop: Stop, say: Callable[[str], None]) -> None:
        self._chains = chains
        self._queue = ShardQueue(shards)
        self._stop = stop
        self._say = say
        self._results: queue.Queue[ShardAttempt] = queue.Queue()
        self._errors: dict[int, BaseException] = {}
        self._told: set[int] = set()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(len(chains))]

    def results(self, on_tick: Callable[[], None]) -> Generator[ShardAttempt, None, None]:
        """Each shard as soon as all its parts are durable; `on_tick` is called about twice a second.

        Raises:
            M2rayError: the last replica ended, an error came that would come in the others too, or the run was stopped.
        """
        for thread in self._threads:
            thread.start()
        try:
            while not self._queue.is_finished:
                yield from self._ready(_TICK_S)
                on_tick()
                self._raise_end()
                if self._stop.asked.is_set():
                    yield from self._flush()
                    raise self._stop.error(GOES_ON)
        finally:
            self._end()

    def _ready(self, timeout_s: float) -> Iterator[ShardAttempt]:
        """The results that are there, having waited for the first."""
        try:
            while True:
                result = self._results.get(timeout=timeout_s)
                yield result
                self._queue.finish(result.shard)
                timeout_s = 0.001
        except queue.Empty:
            return

    def _flush(self) -> Iterator[ShardAttempt]:
        """What comes in a short while after the run was asked to stop: shards that were being written."""
        deadline = time.monotonic() + _FLUSH_S
        while time.monotonic() < deadline and not self._queue.is_finished and any(thread.is_alive() for thread in self._threads):
            yield from self._ready(0.2)
        for chain, _ in self._chains:
            chain.stop.set()

    def _run(self, number: int) -> None:
        try:
            self._chains[number][0].run(self._queue, self._results.put)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, whatever it is
            self._errors[number] = error

    def _raise_end(self) -> None:
        for number, error in list(self._errors.items()):
            alive = [thread for thread in self._threads if thread.is_alive()]
            if not isinstance(error, (ChainLostError, ClusterError, StoreError)) or not alive:
                raise error
            if number not in self._told:
                self._told.add(number)
                self._say(f"Replica {number} is gone, {len(alive)} go on: {error}")

    def _end(self) -> None:
        for chain, _ in self._chains:
            chain.stop.set()
        for _, stages in self._chains:
            stages.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_JOIN_S)
