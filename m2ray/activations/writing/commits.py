"""Claiming a run, committing its shards and finishing it: who may write what, and when it counts.

A shard counts once its commit exists. That is created only if absent, names the parts of one attempt, and never changes; so
of any number of drivers one wins each shard, and a kill at any moment leaves a shard whole or absent. Parts are deleted by the end of a run
alone, which first marks their attempts as swept: a commit that names one comes too late, and does not count. tests/protocol holds all of this as a model, whose states are searched.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from m2ray.activations.commit_table import Committed, read_committed
from m2ray.activations.job import JOB_KEY, SEQUENCE_FILE, JobRecord, moved_away, read_job, require_same_job, require_todays_format, utc_now
from m2ray.activations.manifest import MANIFEST_KEY, lost_parts, manifest_file, read_manifest
from m2ray.activations.records import (
    SUCCESS_KEY,
    CommitRecord,
    CommittedPart,
    RunSummary,
    commit_key,
    committed_and_void,
    committed_shards,
    read_commit,
    read_summary,
    swept_key,
)
from m2ray.activations.schema import FORMAT_VERSION, parse_part_key, stored_parts
from m2ray.activations.statistics import are_whole, lost_statistics, stored_contributions
from m2ray.activations.writing.merging import merge_statistics
from m2ray.batches import PartReceipt, Shard
from m2ray.errors import AlreadyExistsError, RunDamagedError, StageError, raise_all
from m2ray.statistics import STATISTICS
from m2ray.storage import Store

__all__ = ["Run", "RunSummary", "claim_run", "read_summary", "reopen"]

_SHOWN_PARTS, _SHOWN_SHARDS = 5, 20
_TRIES = 3
_MARKED_AT_ONCE = 8
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


class Run:
    """A claimed run folder, the driver's side of it. `job` is the record that its folder holds."""

    def __init__(self, store: Store, job: JobRecord) -> None:
        self.store = store
        self.job = job
        self._committed = committed_shards(store)

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

    def finished(self) -> RunSummary | None:
        """The account of a finished run in which `_SUCCESS`, manifest, commits and files agree; else None. No commit is read.

        Raises:
            StoreError: something could not be read.
        """
        summary, manifest = self._recorded()
        if summary is None or manifest is None or committed_shards(self.store) != set(range(self.job.num_shards)):
            return None
        is_swept = stored_parts(self.store, self.job.parts) == _sizes(manifest) and not self._other_surveys()
        return summary if is_swept and are_whole(self.store, self.job) else None

    def finish(self) -> RunSummary:
        """Close the account, write manifest.parquet, sweep, and last of all write `_SUCCESS`. Safe to repeat.

        A finished run in which nothing changed since stays as it is. Where commits and records differ, the commits are right.

        Raises:
            StageError: shards are not committed yet, or are committed anew all the while.
            RunDamagedError: the committed shards do not add up to what job.json says, or a part is gone or has another size.
            StoreError: something could not be written.
        """
        for _ in range(_TRIES):
            summary = self.finished() or self._close()
            if summary:
                return summary
        raise StageError("The commits changed while the run was finished: another driver is at it.", "Run the same command again.")

    def _close(self) -> RunSummary | None:
        """All of the end, once. None if another driver has written the manifest meanwhile, or the commits have changed."""
        was_finished = self.store.size(SUCCESS_KEY) is not None  # asked before the commits are read, which were all there then
        recorded, written = self._recorded()
        has_manifest = self.store.size(MANIFEST_KEY) is not None
        stored = stored_parts(self.store, self.job.parts)  # before the commits are read: what is written later may still come to count
        contributions = stored_contributions(self.store, self.job)
        self._committed = committed_shards(self.store)
        self._require_all(was_finished=was_finished)
        named = self._named()
        manifest, summary = named.parts, self._account(named)
        self._require_parts(manifest, stored)
        merge_statistics(self.store, self.job)
        is_written = written is not None and written.equals(manifest)
        wrong = [SUCCESS_KEY] if was_finished and not (is_written and _say_the_same(recorded, summary)) else []
        wrong += [MANIFEST_KEY] if has_manifest and not is_written else []
        for key in wrong:
            self.store.delete([key])
        # Created only if absent: of a driver that stood still since it read the commits it must not replace what another one wrote.
        if not is_written and not self._created(MANIFEST_KEY, manifest_file(manifest, self.job.run_id)):
            return None
        self._sweep(stored.keys() - _sizes(manifest).keys())
        self.store.delete(contributions)  # whose ever they are: their shards are merged, and are so once
        self._created(SUCCESS_KEY, summary.to_json())
        return summary if self._says(manifest) else None

    def _created(self, key: str, data: bytes) -> bool:
        try:
            self.store.create(key, data)
        except AlreadyExistsError:
            return False
        return True

    def _says(self, manifest: Any) -> bool:
        """Whether the records, and the commits, still say what this manifest says. Commits are read only if a part is there that it does not name."""
        recorded, written = self._recorded()
        self._committed = committed_shards(self.store)
        if recorded is None or written is None or not written.equals(manifest) or len(self._committed) < self.job.num_shards:
            return False
        is_swept = stored_parts(self.store, self.job.parts) == _sizes(manifest)
        return is_swept or bool(self._named().parts.equals(manifest))

    def _require_all(self, *, was_finished: bool) -> None:
        """Raise StageError unless every shard is committed; a run that lacks one ceases to be finished."""
        absent = [number for number in range(self.job.num_shards) if number not in self._committed]
        if absent:
            if was_finished:
                self.store.delete([SUCCESS_KEY])
            what = f"{len(absent)} of {self.job.num_shards} shards are not committed, the first is {absent[0]}."
            raise StageError(what, "Run the same command again: it does the missing ones.")

    def _recorded(self) -> tuple[RunSummary | None, Any]:
        """What `_SUCCESS` and the manifest say; None for one that is absent, damaged or another run's: both follow from the commits."""
        summary = manifest = None
        with suppress(RunDamagedError):
            summary = read_summary(self.store)
        if self.store.size(MANIFEST_KEY) is not None:
            with suppress(RunDamagedError):
                manifest = read_manifest(self.store, self.job, self.job.num_shards * len(self.job.parts))
        return (summary if summary and summary.run_id == self.job.run_id else None), manifest

    def _named(self) -> Committed:
        """What the commits name."""
        return read_committed(self.store, self.job, self._committed)

    def _require_parts(self, manifest: Any, stored: Mapping[str, int]) -> None:
        """Raise RunDamagedError unless every part is there with its size. Those committed since `stored` was listed are looked at again."""
        lost = lost_parts(manifest, stored)
        lost = lost and lost_parts(manifest, stored_parts(self.store, self.job.parts))
        if lost:
            listed = [self.store.where(part.key) for part in lost[:_SHOWN_PARTS]]
            more = [f"and {len(lost) - _SHOWN_PARTS:,} more"] if len(lost) > _SHOWN_PARTS else []
            shards = ", ".join(map(str, sorted({part.shard for part in lost})[:_SHOWN_SHARDS]))
            raise RunDamagedError(
                f"{len(lost):,} of {len(manifest):,} parts are gone or have another size than was committed:",
                f"Run the same extract command again: it extracts their shards again (the first are {shards}).",
                [*listed, *more],
            )

    def _account(self, named: Committed) -> RunSummary:
        """Check that every sequence of the source is either committed or quarantined. Raises RunDamagedError."""
        counts, bytes_of_parts = self.job.counts, named.parts["num_bytes"].to_pylist()
        _, shards, committed, rows = named
        found = (shards, committed + counts.quarantined, rows)
        if found != (self.job.num_shards, counts.sequences, counts.rows):
            raise RunDamagedError(
                f"The account of the run at {self.store.url} does not close: {shards} shards with {committed} sequences and {rows} rows a part "
                f"are committed and {counts.quarantined} sequences are quarantined; job.json says {self.job.num_shards} shards, "
                f"{counts.sequences} sequences and {counts.rows} rows.",
                "The folder holds files of several runs: restore it, or begin another run.",
            )
        return RunSummary(
            format_version=FORMAT_VERSION,
            run_id=self.job.run_id,
            finished_at=utc_now(),
            sequences=counts.sequences,
            committed=committed,
            quarantined=counts.quarantined,
            tokens=counts.tokens,
            shards=shards,
            parts=len(bytes_of_parts),
            num_bytes=sum(bytes_of_parts),
            rows=rows,
            without_rows=counts.without_rows,
        )

    def _sweep(self, unnamed: Iterable[str]) -> None:
        """Delete parts of the run's shards that no commit names, surveys that job.json does not name, and what dead writers left
        unfinished.
        """
        self.store.delete_unfinished()
        attempts = {key: name for key in unnamed if (name := parse_part_key(key)) and name[0] < self.job.num_shards}
        self._mark_swept(sorted(set(attempts.values())))
        self.store.delete([*self._other_surveys(), *attempts])

    def _mark_swept(self, attempts: Sequence[tuple[int, str]]) -> None:
        """Before their parts go: a driver that stood still may commit one of them at any time after, should its shard's name be free again."""
        if attempts:
            with ThreadPoolExecutor(_MARKED_AT_ONCE, thread_name_prefix="sweep") as pool:
                for _ in pool.map(lambda attempt: self._created(swept_key(*attempt), b""), attempts):
                    pass

    def _other_surveys(self) -> list[str]:
        """Files that surveys wrote and job.json does not name."""
        surveyed = {file.key for file in self.job.sequence_files}
        return [key for key, _ in self.store.list("sequences") if key not in surveyed and re.fullmatch(SEQUENCE_FILE, key)]


def _committed(part: PartReceipt) -> CommittedPart:
    return CommittedPart(part.site, part.layer, part.key, part.num_bytes, part.xxh3, part.tail_bytes, part.tail_xxh3)


def _say_the_same(recorded: RunSummary | None, now: RunSummary) -> bool:
    return recorded is not None and replace(recorded, finished_at=now.finished_at) == now


def _sizes(manifest: Any) -> dict[str, int]:
    """The bytes of each part by its key."""
    return dict(zip(manifest["key"].to_pylist(), manifest["num_bytes"].to_pylist(), strict=True))


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
