"""How far the chains are, gathered for the progress line."""

import time
from collections.abc import Sequence

from m2ray.batches import Shard
from m2ray.chain.driver import Chain
from m2ray.chain.progress import Extracted, Progress
from m2ray.chain.stages import Stages


class Monitor:
    """Turns what the chains say into the progress line."""

    def __init__(
        self, chains: Sequence[tuple[Chain, Stages]], shards: Sequence[Shard], missing: Sequence[Shard], progress: Progress
    ) -> None:
        self._chains = chains
        self._is_loaded = False
        self._progress = progress
        self._all_shards = len(shards)
        self._shards = self._all_shards - len(missing)
        self._all_tokens = sum(shard.num_tokens for shard in shards)
        self._tokens_before = self._all_tokens - sum(shard.num_tokens for shard in missing)
        self._asked_at = 0.0

    def committed(self) -> None:
        self._shards += 1
        if self._shards == self._all_shards:
            for _ in range(1 if self._is_loaded else 2):
                self._asked_at = 0.0
                self.tick()

    def tick(self) -> None:
        """Show what the stages said last, at most every two seconds."""
        now = time.monotonic()
        if now - self._asked_at < 2.0:
            return
        self._asked_at = now
        statuses = [status for _, stages in self._chains for status in stages.statuses]
        if not self._is_loaded:
            self._progress.loading(statuses)
            self._is_loaded = len(statuses) == sum(len(stages) for _, stages in self._chains) and all(status.ready for status in statuses)
            return
        self._progress.extracting(
            Extracted(
                shards=self._shards,
                all_shards=self._all_shards,
                tokens=sum(chain.tokens_done for chain, _ in self._chains),
                all_tokens=self._all_tokens,
                tokens_before=self._tokens_before,
                written_bytes=sum(status.written_bytes for status in statuses),
                write_wait_s=max((status.write_wait_s for status in statuses), default=0.0),
            )
        )
