"""ShardQueue: the shards that are still to be extracted, taken by the replicas and given back by those that fail."""

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from m2ray.batches import Shard


class ShardQueue:
    """Each shard is with one chain at a time. Any thread may call."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._changed = threading.Condition()
        self._waiting = deque(shards)
        self._unfinished = {shard.index for shard in self._waiting}

    @property
    def is_finished(self) -> bool:
        """Whether every shard was finished; until then shards may come back."""
        return not self._unfinished

    def take(self) -> Shard | None:
        """The next shard, if one is waiting now."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def give_back(self, shards: Sequence[Shard]) -> None:
        """Put shards that were taken in front of the others, in their order."""
        with self._changed:
            self._waiting.extendleft(reversed(shards))
            self._changed.notify_all()

    def finish(self, shard: Shard) -> None:
        """Note that a shard needs no more work."""
        with self._changed:
            self._unfinished.discard(shard.index)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Wait until a shard is waiting or all are finished, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_finished, timeout_s)
