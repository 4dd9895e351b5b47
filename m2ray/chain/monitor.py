"""How far the chains are, gathered for the progress line."""

import time
from collections.abc import Sequence
from dataclasses import fields

from m2ray.batches import PartReceipt, Shard
from m2ray.chain.driver import Chain
from m2ray.chain.progress import Extracted, Progress
from m2ray.chain.report import StageMeasured, loaded_lines
from m2ray.chain.stages import Stages
from m2ray.chain.status import StageStatus
from m2ray.planning.placing import StagePlan
from m2ray.planning.plan import Plan

_EVERY_S = 2.0


class Monitor:
    """Turns what the chains say into the progress line, and at the end into the measurements of the report."""

    def __init__(
        self, plan: Plan, chains: Sequence[tuple[Chain, Stages]], shards: Sequence[Shard], missing: Sequence[Shard], progress: Progress
    ) -> None:
        self._plan = plan
        self._chains = chains
        self._progress = progress
        self._all_shards = len(shards)
        self._shards = self._all_shards - len(missing)
        self._all_tokens = sum(shard.num_tokens for shard in shards)
        self._missing_tokens = sum(shard.num_tokens for shard in missing)
        self._began_at = time.monotonic()
        self._ended_at = self._began_at
        self._output_bytes = 0
        self._was_loaded = False
        self._asked_at = 0.0

    def committed(self, receipts: Sequence[PartReceipt]) -> None:
        """Count a shard whose parts these are."""
        self._shards += 1
        self._output_bytes += sum(receipt.num_bytes for receipt in receipts)
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
        statuses = [status for _, stages in self._chains for status in stages.statuses]
        if not self._was_loaded:
            self._progress.loading(statuses)
            if not all(stages.is_loaded for _, stages in self._chains):
                return
            self._was_loaded = True
            for line in loaded_lines(self._plan, self._stages()):
                self._progress.say(line)
        self._progress.extracting(
            Extracted(
                shards=self._shards,
                all_shards=self._all_shards,
                tokens=sum(chain.tokens_done for chain, _ in self._chains),
                all_tokens=self._all_tokens,
                tokens_before=self._all_tokens - self._missing_tokens,
                elapsed_s=(self._ended_at if self._shards == self._all_shards else now) - self._loaded_at(),
                written_bytes=sum(status.written_bytes for status in statuses),
                write_wait_s=max((status.write_wait_s for status in statuses), default=0.0),
                gpu_busy=_busy(statuses),
                gpu_used_bytes=max((gpu.used_bytes for status in statuses for gpu in status.gpus), default=0),
            )
        )

    def measured(self) -> tuple[float, float, int, int, tuple[StageMeasured, ...]]:
        """(seconds until the stages were loaded, seconds since, tokens of this run, bytes of its committed parts, the stages)."""
        loaded_at = self._loaded_at()
        return loaded_at - self._began_at, self._ended_at - loaded_at, self._missing_tokens, self._output_bytes, self._stages()

    def _loaded_at(self) -> float:
        """When the first chain had its layers; where none has, when the run ended."""
        return min((stages.loaded_at for _, stages in self._chains if stages.loaded_at), default=self._ended_at)

    def _stages(self) -> tuple[StageMeasured, ...]:
        """Every stage that has answered. One that was restarted counts from there on."""
        measured = []
        for planned in self._plan.stages:
            of_replica = [stage.stage for stage in self._plan.stages if stage.replica == planned.replica]
            status = self._chains[planned.replica][1].status(of_replica.index(planned.stage))
            if status is not None:
                measured.append(_measured(planned, status))
        return tuple(measured)


def _measured(planned: StagePlan, status: StageStatus) -> StageMeasured:
    names = {field.name for field in fields(StageMeasured)} & {field.name for field in fields(StageStatus)}
    said = {name: getattr(status, name) for name in names - {"span"}}
    return StageMeasured(replica=planned.replica, stage=planned.stage, span=planned.span, **said)


def _busy(statuses: Sequence[StageStatus]) -> float | None:
    """The share of the time since its first micro-batch that the GPU of the busiest stage computed; None without GPUs."""
    shares = [status.compute_s / (status.compute_s + status.wait_s) for status in statuses if status.gpus and status.compute_s]
    return max(shares, default=None)
