"""Claiming a run and committing its shards: who may write what, and when it counts. How it ends has a file of its own (finishing.py).

A shard counts once its commit exists. That is created only if absent, names the parts of one attempt, and never changes; so
of any number of drivers one wins each shard, and a kill at any moment leaves a shard whole or absent. Parts are deleted by the end of a run
alone, which first marks their attempts as swept: a commit that names one comes too late, and does not count. tests/protocol holds all of this as a model, whose states are searched.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from m2ray.activations.job import JOB_KEY, JobRecord, moved_away, read_job, utc_now
from m2ray.activations.manifest import MANIFEST_KEY, lost_parts
from m2ray.activations.records import (
    SUCCESS_KEY,
    CommitRecord,
    CommittedPart,
    RunSummary,
    commit_key,
    committed_and_void,
    read_commit,
    read_summary,
)
from m2ray.activations.resumable import require_same_job, require_todays_format
from m2ray.activations.schema import FORMAT_VERSION, stored_parts
from m2ray.activations.statistics import lost_statistics
from m2ray.activations.writing.finishing import Finishing
from m2ray.batches import PartReceipt, Shard
from m2ray.errors import AlreadyExistsError, StageError, raise_all
from m2ray.statistics import STATISTICS
from m2ray.storage import Store

__all__ = ["Run", "RunSummary", "claim_run", "read_summary", "reopen"]

_DEFECT = "This is a defect of m2ray: the shard was not committed."


def claim_run(store: Store, job: JobRecord) -> "Run":
    """Begin the run that `job` describes, or go on with it: job.json is created if absent, else it must say the same.

    Of two drivers that claim at the same time one creates the record and the other goes on with that. `Run.job` is the
    record that counts: its `run_id` and `sequence_files` are those of the driver that created it.

    Raises:
        RunConflictError: the folder holds another job (every differing field is named), a newer format, or something else.
        RunDamagedError: its job.json cannot be understood.
        StoreError: it cannot be written.
    """
    recorded = read_job(store)
    if recorded is None:
        try:
            store.create(JOB_KEY, job.to_json())
        except AlreadyExistsError:
            recorded = read_job(store)
    if recorded is not None:
        require_same_job(store, recorded, job)
    return go_on_with(store, recorded or job)


def go_on_with(store: Store, recorded: JobRecord) -> "Run":
    """The run that a record describes, once what dead writers left unfinished is gone. Raises StoreError."""
    store.delete_unfinished()
    return Run(store, recorded)


def reopen(store: Store, job: JobRecord, shards: Iterable[int]) -> list[str]:
    """Make shards uncommitted again, so that the same command extracts them again. No driver may run. Safe to repeat.

    Their parts stay until that command ends: an attempt of a driver that stood still all the while may still come to count. With no
    shards, only `manifest.parquet` and `_SUCCESS` go, which the next command writes.

    Returns:
        The keys of the records that were there and are deleted.

    Raises:
        RunConflictError: it is of an older format, whose shards this m2ray does not extract.
        StoreError: something could not be deleted.
    """
    require_todays_format(store, job)
    return _uncommit(store, shards)


def _uncommit(store: Store, shards: Iterable[int]) -> list[str]:
    """In this order: an end of the run that does not see yet that a commit is gone has created `_SUCCESS` before it is deleted here."""
    keys = [*map(commit_key, sorted(set(shards))), SUCCESS_KEY, MANIFEST_KEY]
    deleted = [key for key in keys if store.size(key) is not None]
    for key in keys:
        store.delete([key])
    return deleted


class Run(Finishing):
    """A claimed run folder, the driver's side of it. `job` is the record that its folder holds."""

    @property
    def committed(self) -> frozenset[int]:
        """The shards that were committed when the run was claimed, and those that this driver saw committed since."""
        return frozenset(self._committed)

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those of the shards that are not committed, in their order."""
        return [shard for shard in shards if shard.index not in self._committed]

    def commit(
        self,
        shard: Shard,
        attempt: str,
        receipts: Sequence[PartReceipt],
        micro_batches: Sequence[tuple[int, int]],
        elapsed_s: float,
        computed_on: str | None = None,
    ) -> bool:
        """Make one attempt the shard's, unless another one is already. Safe to repeat.

        Args:
            shard: what was extracted.
            attempt: the attempt that all receipts are of.
            receipts: one for each part of the job, and of each stage that takes statistics one, from all stages, in any order.
            micro_batches: (sequences, padded length) of each, in order.
            elapsed_s: seconds that the attempt took.
            computed_on: kinds of the GPUs or CPUs that it ran on (CommitRecord).

        Returns:
            Whether this attempt is the one that counts. If not, its parts stay until the end of the run.

        Raises:
            RunConflictError: the folder was renamed or deleted meanwhile.
            StageError: parts are missing, doubled, of several attempts, or hold other rows than the shard.
            StoreError: the commit could not be written or read.
        """
        raise_all(_problems(self.job, shard, attempt, receipts, micro_batches))
        if self.store.size(JOB_KEY) is None:
            raise moved_away(self.store)
        record = CommitRecord(
            format_version=FORMAT_VERSION,
            run_id=self.job.run_id,
            shard=shard.index,
            attempt=attempt,
            num_sequences=len(shard.sequence_ids),
            rows=shard.num_rows,
            token_digest=receipts[0].token_digest,
            micro_batches=tuple(micro_batches),
            elapsed_s=round(elapsed_s, 3),
            committed_at=utc_now(),
            parts=tuple(_committed(part) for part in receipts if part.site != STATISTICS),
            computed_on=computed_on,
            statistics=tuple(_committed(part) for part in receipts if part.site == STATISTICS),
        )
        try:
            self.store.create(commit_key(shard.index), record.to_json())
        except AlreadyExistsError:
            is_ours = read_commit(self.store, self.job, shard.index).attempt == attempt
        else:
            is_ours = True
        self._committed.add(shard.index)
        return is_ours

    def reopen_damaged(self) -> list[int]:
        """Make shards uncommitted of which a part is gone or has another size, or of which statistics are gone that are not merged yet; a run
        that lacks a commit ceases to be finished.

        Void commits, which stand in the way of others, are deleted. What the shards' attempts left stays until the run is finished: nothing that another driver may be at is deleted here.

        Returns:
            The shards that were committed and are not any more, ascending.

        Raises:
            RunDamagedError: a commit cannot be understood, or merged statistics are gone.
            StoreError: something could not be read or deleted.
        """
        if self.finished():
            return []
        was_finished = self.store.size(SUCCESS_KEY) is not None  # asked before the commits are listed: they were all there then
        self._committed, void = committed_and_void(self.store)
        named = self._named().parts
        # Listed after the commits were read: what they name was there before them.
        damaged = {part.shard for part in lost_parts(named, stored_parts(self.store, self.job.parts))}
        damaged |= {shard for shard, _ in lost_statistics(self.store, self.job, self._committed)}
        if damaged or void or (was_finished and len(self._committed) < self.job.num_shards):
            _uncommit(self.store, damaged | void)
            self._committed -= damaged
        return sorted(damaged)


def _committed(part: PartReceipt) -> CommittedPart:
    return CommittedPart(part.site, part.layer, part.key, part.num_bytes, part.xxh3, part.tail_bytes, part.tail_xxh3)


def _problems(
    job: JobRecord, shard: Shard, attempt: str, receipts: Sequence[PartReceipt], micro_batches: Sequence[tuple[int, int]]
) -> list[StageError]:
    """Everything that keeps these receipts from being the shard."""
    found = Counter((part.site, part.layer) for part in receipts if part.site != STATISTICS)
    wanted = {(part.site, part.layer) for part in job.parts}
    problems = [f"{_name(part)} came {count} times." for part, count in found.items() if count > 1]
    problems += [f"{_name(part)} is missing." for part in sorted(wanted - found.keys(), key=str)]
    problems += [f"{_name(part)} is none of the run's." for part in sorted(found.keys() - wanted, key=str)]
    for part in receipts:
        if (part.shard, part.attempt) != (shard.index, attempt):
            problems.append(f"{part.key} is of shard {part.shard}, attempt {part.attempt}.")
        if part.rows != shard.num_rows:
            problems.append(f"{part.key} has {part.rows} rows; the shard has {shard.num_rows}.")
    if any(part.site == STATISTICS for part in receipts) != bool(job.statistics):
        problems.append("Statistics are missing, or came unasked.")
    digests = {part.token_digest for part in receipts}
    if len(digests) > 1:
        problems.append(f"The parts hold different tokens: {len(digests)} digests.")
    if sum(num_sequences for num_sequences, _ in micro_batches) != len(shard.sequence_ids):
        problems.append(f"The micro-batches {list(micro_batches)} do not add up to {len(shard.sequence_ids)} sequences.")
    return [StageError(f"Shard {shard.index}, attempt {attempt}: {problem}", _DEFECT) for problem in problems]


def _name(part: tuple[str, int | None]) -> str:
    site, layer = part
    return site if layer is None else f"{site} of layer {layer}"
