"""How far the chains are, gathered for the progress line, the report and the metrics."""

import time
from collections import Counter
from collections.abc import Sequence

from m2ray.batches import PartReceipt, Shard
from m2ray.chain.driver import Chain
from m2ray.chain.failure import FailureKind
from m2ray.chain.progress import Progress
from m2ray.chain.report import loaded_lines
from m2ray.chain.stages import Stages
from m2ray.chain.status import RunStatus
from m2ray.planning.plan import Plan
from m2ray.statistics import STATISTICS

_EVERY_S = 2.0


class Monitor:
    """Makes the progress line of what the chains say, and at the end the measurements of the report."""

    def __init__(
        self,
        plan: Plan,
        chains: Sequence[tuple[Chain, Stages]],
        shards: Sequence[Shard],
        missing: Sequence[Shard],
        progress: Progress,
        quarantined: int = 0,
    ) -> None:
        self._plan = plan
        self._chains = chains
        self._progress = progress
        self._quarantined = quarantined
        self._all_shards = len(shards)
        self._shards = self._shards_before = self._all_shards - len(missing)
        self._all_tokens = sum(shard.num_tokens for shard in shards)
        self._missing_tokens = sum(shard.num_tokens for shard in missing)
        self._began_at = time.monotonic()
        self._ended_at = self._began_at
        self._rows = self._row_tokens = 0
        self._site_rows: Counter[str] = Counter()
        self._site_bytes: Counter[str] = Counter()
        self._was_loaded = False
        self._asked_at = 0.0

    def committed(self, shard: Shard, receipts: Sequence[PartReceipt]) -> None:
        """Count a shard, and its parts."""
        self._shards += 1
        self._rows += shard.num_rows
        self._row_tokens += shard.num_tokens
        for receipt in receipts:
            if receipt.site != STATISTICS:
                self._site_rows[receipt.site] += receipt.rows
                self._site_bytes[receipt.site] += receipt.num_bytes
        if self._shards == self._all_shards:
            self._ended_at = time.monotonic()
            for _, stages in self._chains:
                stages.ask_all()  # the last look: the stages end when the last result has been taken
            self._asked_at = 0.0
            self.tick()

    def tick(self) -> None:
        """Show what the stages said last, at most every two seconds."""
        now = time.monotonic()
        if now - self._asked_at < _EVERY_S:
            return
        self._asked_at = now
        if not self._was_loaded:
            statuses = [status for _, stages in self._chains for status in stages.statuses]
            are_there = not any(stages.reads for _, stages in self._chains)
            self._progress.loading(statuses, compiles=self._plan.demand.options.compile, are_there=are_there)
            if not all(stages.is_loaded for _, stages in self._chains):
                return
            self._was_loaded = True
            for line in () if are_there else loaded_lines(self._plan, self.status().stages):
                self._progress.say(line)
        self._progress.extracting(self.status())

    def status(self) -> RunStatus:
        """The run by now, or at its end, as the stages said last. For any thread."""
        site_bytes, failures = dict(self._site_bytes), [failure for chain, _ in self._chains for failure in chain.failures]
        loaded_at, ended_at = self._loaded_at(), self._ended_at if self._shards == self._all_shards else time.monotonic()
        stages = []
        for planned in self._plan.stages:
            of_replica = [stage.stage for stage in self._plan.stages if stage.replica == planned.replica]
            status = self._chains[planned.replica][1].status(of_replica.index(planned.stage))
            if status is not None:
                stages.append((planned, status))
        return RunStatus(
            shards=self._shards,
            all_shards=self._all_shards,
            tokens=sum(chain.tokens_done for chain, _ in self._chains),
            tokens_before=self._all_tokens - self._missing_tokens,
            all_tokens=self._all_tokens,
            load_s=loaded_at - self._began_at,
            extract_s=ended_at - loaded_at,
            output_bytes=sum(site_bytes.values()),
            rows=self._rows,
            row_tokens=self._row_tokens,
            stages=tuple(stages),
            shards_here=self._shards - self._shards_before,
            quarantined=self._quarantined,
            site_rows=dict(self._site_rows),
            site_bytes=site_bytes,
            failures=len(failures),
            store_failures=sum(failure.kind is FailureKind.STORE for failure in failures),
            retried_shards=sum(len(failure.shards) for failure in failures),
        )

    def _loaded_at(self) -> float:
        """When the first chain had its layers; where none has, when the run ended."""
        return min((stages.loaded_at for _, stages in self._chains if stages.loaded_at), default=self._ended_at)
