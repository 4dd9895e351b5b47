"""What has left the chain: the last stage keeps it until the driver has been told."""

from dataclasses import dataclass

from m2ray.batches import PartReceipt
from m2ray.chain.turns import Turns


@dataclass(frozen=True)
class GatheredShard:
    """A shard that every stage has written: the receipts of all, in the order of the stages."""

    shard: int
    attempt: str
    receipts: tuple[PartReceipt, ...]


@dataclass(frozen=True)
class Completed:
    """What left the chain: micro-batches since the epoch began, and shards that the driver has not been told of yet."""

    steps: int
    shards: tuple[GatheredShard, ...]


class Completion:
    """The shards of one epoch that are gathered, less those that the driver knows of. Any thread may call."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._gathered: list[GatheredShard] = []
        self._told_shards = 0

    def add(self, epoch: int, shard: GatheredShard) -> None:
        """Keep a shard. Raises Superseded if the epoch is over."""
        with self._turns.changed:
            self._turns.require(epoch)
            self._gathered.append(shard)
            self._turns.changed.notify_all()

    def beyond(self, epoch: int, steps: int, shards: int, timeout_s: float) -> Completed:
        """What is complete, as soon as it is more than `steps` micro-batches and `shards` shards, or after `timeout_s`."""
        turns = self._turns
        with turns.changed:
            if epoch == turns.epoch:
                self._gathered = self._gathered[shards - self._told_shards :]
                self._told_shards = shards
            turns.changed.wait_for(lambda: epoch != turns.epoch or turns.done > steps or self._gathered, timeout_s)
            return Completed(turns.done, tuple(self._gathered)) if epoch == turns.epoch else Completed(steps, ())
