"""Claiming a run, committing its shards and finishing it: who may write what, and when it counts.

A shard counts once its commit exists. That is created only if absent, names the parts of one attempt, and never changes; so
of any number of drivers one wins each shard, and a kill at any moment leaves a shard whole or absent.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from m2ray.activations.job import JOB_KEY, JobRecord, read_job, require_same_job, utc_now
from m2ray.activations.manifest import MANIFEST_KEY, manifest_table, write_manifest
from m2ray.activations.records import (
    SUCCESS_KEY,
    CommitRecord,
    CommittedPart,
    RunSummary,
    commit_key,
    committed_shards,
    read_commit,
    read_summary,
)
from m2ray.activations.schema import FORMAT_VERSION, parse_part_key
from m2ray.batches import PartReceipt, Shard
from m2ray.errors import AlreadyExistsError, RunDamagedError, StageError, raise_all
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
    store.delete_unfinished()
    return Run(store, recorded or job)


def reopen(store: Store, shards: Iterable[int]) -> None:
    """Make shards uncommitted again, so that the same command extracts them anew. No driver may run. Safe to repeat.

    First the run ceases to be finished, then the shards cease to count, then their parts go: whoever opens the run in between
    sees whole shards or none. With no shards, only `manifest.parquet` and `_SUCCESS` are made anew by the next command.

    Raises:
        StoreError: something could not be deleted.
    """
    numbers = set(shards)
    for key in (SUCCESS_KEY, MANIFEST_KEY, *map(commit_key, sorted(numbers))):
        store.delete([key])
    named = ((key, parse_part_key(key)) for key, _ in store.list("data")) if numbers else ()
    store.delete([key for key, name in named if name and name[0] in numbers])


class Run:
    """A claimed run folder, the driver's side of it. `job` is the record that its folder holds."""

    def __init__(self, store: Store, job: JobRecord) -> None:
        self.store = store
        self.job = job
        self._committed = committed_shards(store)

    @property
    def is_finished(self) -> bool:
        """Whether `_SUCCESS` is there."""
        return self.store.size(SUCCESS_KEY) is not None

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
    ) -> bool:
        """Make one attempt the shard's, unless another one is already. Safe to repeat.

        Args:
            shard: what was extracted.
            attempt: the attempt that all receipts are of.
            receipts: one for each part of the job, from all stages, in any order.
            micro_batches: (sequences, padded length) of each, in order.
            elapsed_s: seconds that the attempt took.

        Returns:
            Whether this attempt is the one that counts. If not, its parts have been deleted.

        Raises:
            StageError: parts are missing, doubled, of several attempts, or hold other rows than the shard.
            StoreError: the commit could not be written or read.
        """
        raise_all(_problems(self.job, shard, attempt, receipts, micro_batches))
        record = CommitRecord(
            format_version=FORMAT_VERSION,
            run_id=self.job.run_id,
            shard=shard.index,
            attempt=attempt,
            num_sequences=len(shard.sequence_ids),
            rows=shard.num_tokens,
            token_digest=receipts[0].token_digest,
            micro_batches=tuple(micro_batches),
            elapsed_s=round(elapsed_s, 3),
            committed_at=utc_now(),
            parts=tuple(
                CommittedPart(part.site, part.layer, part.key, part.num_bytes, part.xxh3, part.tail_bytes, part.tail_xxh3)
                for part in receipts
            ),
        )
        try:
            self.store.create(commit_key(shard.index), record.to_json())
        except AlreadyExistsError:
            is_ours = read_commit(self.store, self.job, shard.index).attempt == attempt
            if not is_ours:
                self.store.delete([part.key for part in receipts])
        else:
            is_ours = True
        self._committed.add(shard.index)
        return is_ours

    def finish(self) -> RunSummary:
        """Close the account, sweep, and write manifest.parquet and, last of all, `_SUCCESS`. Safe to repeat.

        Raises:
            StageError: shards are not committed yet.
            RunDamagedError: the committed shards do not add up to what job.json says.
            StoreError: something could not be written.
        """
        self._committed = committed_shards(self.store)
        absent = [number for number in range(self.job.num_shards) if number not in self._committed]
        if absent:
            what = f"{len(absent)} of {self.job.num_shards} shards are not committed, the first is {absent[0]}."
            raise StageError(what, "Run the same command again: it does the missing ones.")
        ledger: list[CommitRecord] = []
        manifest = manifest_table(self._receipts(ledger))
        summary = self._account(ledger, manifest["num_bytes"].to_pylist())
        self._sweep({commit.shard: commit.attempt for commit in ledger})
        write_manifest(self.store, manifest, self.job.run_id)
        try:
            self.store.create(SUCCESS_KEY, summary.to_json())
        except AlreadyExistsError:
            return read_summary(self.store) or summary
        return summary

    def _commits(self) -> Iterator[CommitRecord]:
        for shard in sorted(self._committed):
            yield read_commit(self.store, self.job, shard)

    def _receipts(self, ledger: list[CommitRecord]) -> Iterator[list[PartReceipt]]:
        """Each shard's receipts; the commits go into `ledger` without their parts, which would fill the memory."""
        for commit in self._commits():
            ledger.append(replace(commit, parts=()))
            yield commit.receipts()

    def _account(self, ledger: Sequence[CommitRecord], bytes_of_parts: Sequence[int]) -> RunSummary:
        """Check that every sequence of the source is either committed or quarantined. Raises RunDamagedError."""
        counts = self.job.counts
        committed, tokens = sum(commit.num_sequences for commit in ledger), sum(commit.rows for commit in ledger)
        found = (len(ledger), committed + counts.quarantined, tokens)
        if found != (self.job.num_shards, counts.sequences, counts.tokens):
            raise RunDamagedError(
                f"The account of the run at {self.store.url} does not close: {len(ledger)} shards with {committed} sequences and {tokens} tokens "
                f"are committed and {counts.quarantined} sequences are quarantined; job.json says {self.job.num_shards} shards, "
                f"{counts.sequences} sequences and {counts.tokens} tokens.",
                "The folder holds files of several runs: restore it, or begin another run.",
            )
        return RunSummary(
            format_version=FORMAT_VERSION,
            run_id=self.job.run_id,
            finished_at=utc_now(),
            sequences=counts.sequences,
            committed=committed,
            quarantined=counts.quarantined,
            tokens=tokens,
            shards=len(ledger),
            parts=len(bytes_of_parts),
            num_bytes=sum(bytes_of_parts),
        )

    def _sweep(self, attempts: Mapping[int, str]) -> None:
        """Delete the parts of committed shards that their commits do not name, surveys that job.json does not name, and what dead writers
        left unfinished.

        Args:
            attempts: of each committed shard, the one that counts.
        """
        self.store.delete_unfinished()
        surveyed = {file.key for file in self.job.sequence_files}
        garbage = [key for key, _ in self.store.list("sequences") if key not in surveyed]
        for key, _ in self.store.list("data"):
            named = parse_part_key(key)
            if named and attempts.get(named[0], named[1]) != named[1]:
                garbage.append(key)
        self.store.delete(garbage)


def _problems(
    job: JobRecord, shard: Shard, attempt: str, receipts: Sequence[PartReceipt], micro_batches: Sequence[tuple[int, int]]
) -> list[StageError]:
    """Everything that keeps these receipts from being the shard."""
    found = Counter((part.site, part.layer) for part in receipts)
    wanted = {(part.site, part.layer) for part in job.parts}
    problems = [f"{_name(part)} came {count} times." for part, count in found.items() if count > 1]
    problems += [f"{_name(part)} is missing." for part in sorted(wanted - found.keys(), key=str)]
    problems += [f"{_name(part)} is none of the run's." for part in sorted(found.keys() - wanted, key=str)]
    for part in receipts:
        if (part.shard, part.attempt) != (shard.index, attempt):
            problems.append(f"{part.key} is of shard {part.shard}, attempt {part.attempt}.")
        if part.rows != shard.num_tokens:
            problems.append(f"{part.key} has {part.rows} rows; the shard has {shard.num_tokens} tokens.")
    digests = {part.token_digest for part in receipts}
    if len(digests) > 1:
        problems.append(f"The parts hold different tokens: {len(digests)} digests.")
    if sum(num_sequences for num_sequences, _ in micro_batches) != len(shard.sequence_ids):
        problems.append(f"The micro-batches {list(micro_batches)} do not add up to {len(shard.sequence_ids)} sequences.")
    return [StageError(f"Shard {shard.index}, attempt {attempt}: {problem}", _DEFECT) for problem in problems]


def _name(part: tuple[str, int | None]) -> str:
    site, layer = part
    return site if layer is None else f"{site} of layer {layer}"
