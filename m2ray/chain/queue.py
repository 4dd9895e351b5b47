"""ShardQueue: the shards that are still to be extracted, taken by the replicas and given back by those that fail."""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from m2ray.batches import Shard

_JUDGED_SHARDS = 4096
"""Of which the first to be extracted is the shortest: a run may have millions."""


class ShardQueue:
    """Each shard is with one chain at a time. Any thread may call.

    A short one comes first, and is soon committed: so it shows early whether all works up to the store. The others come in their order, which has
    the longest sequences first (prompts/shards.py).
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._changed = threading.Condition()
        self._waiting = deque(shards)
        if judged := list(islice(self._waiting, _JUDGED_SHARDS)):
            shortest = min(range(len(judged)), key=lambda number: judged[number].num_tokens)
            del self._waiting[shortest]
            self._waiting.appendleft(judged[shortest])
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
