"""The small records by which a run says what it holds: `_commits/shard-000012.json` for each shard, `weights.json` and `_SUCCESS` for the whole.

And what it holds no longer: `_swept/shard-000012-<attempt>` says that this attempt's parts were deleted, and can never count again.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import read_record, to_json
from m2ray.activations.schema import parse_contribution_key, part_folder, part_name
from m2ray.batches import PartReceipt
from m2ray.errors import RunConflictError, RunDamagedError, StoreError
from m2ray.storage import Store

SUCCESS_KEY = "_SUCCESS"
WEIGHTS_KEY = "weights.json"
_READ_AT_ONCE, _AHEAD = 16, 256
_COMMIT_NAME = re.compile(r"_commits/shard-(\d{6,})\.json")
_SWEPT_NAME = re.compile(r"_swept/shard-(\d{6,})-([0-9a-z]+)")


@dataclass(frozen=True)
class CommittedPart:
    """What a commit says of one part beyond what all parts of the shard share."""

    site: str
    layer: int | None
    key: str
    num_bytes: int
    xxh3: str
    tail_bytes: int | None = None
    tail_xxh3: str | None = None


@dataclass(frozen=True)
class CommitRecord:
    """A shard's commit: the parts of the one attempt that counts.

    Attributes:
        num_sequences: sequences in the shard.
        rows: in each part: the shard's chosen tokens.
        token_digest: xxh3-128 over the shard's TOKEN_ROW rows, 32 hex digits.
        micro_batches: (sequences, padded length) of each, in order: what went through the model together.
        elapsed_s: seconds that the attempt took.
        committed_at: UTC, ISO 8601.
        computed_on: the kinds of GPU of the attempt's cluster, or of CPU where it ran on none (m2ray.provenance.cpu_kind); None where it
            is not known.
        statistics: what the stages contributed of the shard's statistics, of each all its sites and layers in one object.
    """

    format_version: int
    run_id: str
    shard: int
    attempt: str
    num_sequences: int
    rows: int
    token_digest: str
    micro_batches: tuple[tuple[int, int], ...]
    elapsed_s: float
    committed_at: str
    parts: tuple[CommittedPart, ...]
    computed_on: str | None = None
    statistics: tuple[CommittedPart, ...] = ()

    def to_json(self) -> bytes:
        return to_json(self)

    def receipts(self) -> list[PartReceipt]:
        """The parts as their writers reported them."""
        columns = self.columns()
        return [PartReceipt(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def contributions(self) -> list[PartReceipt]:
        """The shard's statistics as their writers reported them."""
        of = (self.shard, self.attempt)
        return [
            PartReceipt(*of, each.site, each.layer, each.key, self.rows, each.num_bytes, each.xxh3, self.token_digest)
            for each in self.statistics
        ]

    def columns(self) -> dict[str, list[Any]]:
        """The fields of the parts' receipts: of each its values in the order of `parts`."""
        shared = {"shard": self.shard, "attempt": self.attempt, "rows": self.rows, "token_digest": self.token_digest}
        own = {name: [getattr(part, name) for part in self.parts] for name in CommittedPart.__dataclass_fields__}
        return {name: [value] * len(self.parts) for name, value in shared.items()} | own


@dataclass(frozen=True)
class WeightsRecord:
    """`weights.json`, which weights a run's rows come from: the digests of what a run's chains load (m2ray.model.digests).

    Attributes:
        embedding: of what runs before the first layer.
        layers: of each layer, from 0 to the last one that the run asks for.
        files: what changes when one of the model's files is written anew, by name, as the driver saw them before the first chain loaded
            (`Checkpoint.versions`); empty where that is not known.
    """

    format_version: int
    run_id: str
    embedding: str
    layers: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSummary:
    """The account of a finished run: `sequences` = `committed` + `quarantined`. `num_bytes` are those of all parts.

    `rows` are those of each site and layer, as many as `tokens` where nothing else is said.
    `without_rows` of the committed sequences have no chosen token.
    """

    format_version: int
    run_id: str
    finished_at: str
    sequences: int
    committed: int
    quarantined: int
    tokens: int
    shards: int
    parts: int
    num_bytes: int
    rows: int = -1
    without_rows: int = 0

    def __post_init__(self) -> None:
        if self.rows < 0:
            object.__setattr__(self, "rows", self.tokens)

    def to_json(self) -> bytes:
        return to_json(self, indent=2)


def commit_key(shard: int) -> str:
    """The key of a shard's commit."""
    return f"_commits/shard-{shard:06d}.json"


def swept_key(shard: int, attempt: str) -> str:
    """The key of an empty object: that the end of a run deletes, or has deleted, this attempt's parts. It stays for good."""
    return f"_swept/shard-{shard:06d}-{attempt}"


def committed_shards(store: Store) -> set[int]:
    """The numbers of the shards that are committed now. Raises StoreError."""
    return committed_and_void(store)[0]


def committed_and_void(store: Store) -> tuple[set[int], set[int]]:
    """The shards that are committed now, and those whose commit is void: it names an attempt that was swept before it came. Raises StoreError."""
    names = (_COMMIT_NAME.fullmatch(key) for key, _ in store.list("_commits"))
    named = {int(name[1]) for name in names if name}
    swept: dict[int, set[str]] = {}
    for name in (_SWEPT_NAME.fullmatch(key) for key, _ in store.list("_swept")):
        if name and int(name[1]) in named:
            swept.setdefault(int(name[1]), set()).add(name[2])
    with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="commits") as pool:
        attempts = pool.map(partial(_attempt, store), swept)
        void = {shard for shard, attempt in zip(swept, attempts, strict=True) if attempt in swept[shard]}
    return named - void, void


def _attempt(store: Store, shard: int) -> str | None:
    """Whose commit a shard has; None for one that cannot be understood, of which whoever reads it says so, and for one that is gone by now."""
    try:
        with suppress(RunDamagedError, RunConflictError):
            return read_record(store, commit_key(shard), _COMMIT).attempt
    except StoreError:
        if store.size(commit_key(shard)) is not None:
            raise
    return None


def read_commit(store: Store, job: JobRecord, shard: int) -> CommitRecord:
    """A shard's commit.

    Raises:
        RunDamagedError: it is not understood, or of another run, another shard or other parts, or names a file that is none of its own.
        RunConflictError: a newer m2ray wrote it.
        StoreError: it cannot be read.
    """
    return _checked(store, job, shard, _folders(job))


def _folders(job: JobRecord) -> dict[tuple[str, int | None], str]:
    return {(part.site, part.layer): part_folder(part) for part in job.parts}


def _checked(store: Store, job: JobRecord, shard: int, folders: Mapping[tuple[str, int | None], str]) -> CommitRecord:
    """A commit, as `read_commit` gives it. `folders` are of each site and layer of the job where its parts lie."""
    record = read_record(store, commit_key(shard), _COMMIT)
    found = {(part.site, part.layer): part.key for part in record.parts}
    if (record.run_id, record.shard, found.keys(), len(record.parts)) != (job.run_id, shard, folders.keys(), len(folders)):
        raise RunDamagedError(
            f"{commit_key(shard)} of the run at {store.url} is of shard {record.shard} of run {record.run_id} with {len(record.parts)} parts; "
            f"job.json is of run {job.run_id} with {len(job.parts)} parts a shard.",
            "The folder holds files of several runs: restore it.",
        )
    name = part_name(shard, record.attempt)
    strange = [key for part, key in found.items() if key != f"{folders[part]}/{name}"]
    strange += [each.key for each in record.statistics if parse_contribution_key(each.key) != (shard, record.attempt)]
    if strange:
        raise RunDamagedError(
            f"{commit_key(shard)} of the run at {store.url} names {strange[0]!r}, which is no part of attempt {record.attempt} at this shard.",
            "Nothing was read there: restore the commit.",
        )
    return record


def read_commits(store: Store, job: JobRecord, shards: Iterable[int]) -> Iterator[CommitRecord]:
    """The commits of these shards, in this order, several read at a time. Raises as `read_commit` does."""
    numbers, folders = list(shards), _folders(job)
    read = partial(_checked, store, job, folders=folders)
    with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="commits") as pool:
        for start in range(0, len(numbers), _AHEAD):
            yield from pool.map(read, numbers[start : start + _AHEAD])


def read_summary(store: Store) -> RunSummary | None:
    """A finished run's account; None while it is not finished. Raises as `read_commit` does."""
    return read_record(store, SUCCESS_KEY, _SUMMARY) if store.size(SUCCESS_KEY) is not None else None


def read_weights(store: Store, job: JobRecord) -> WeightsRecord:
    """The record of a run that has one. Raises RunDamagedError (not understood, another run's), RunConflictError (a newer format) or StoreError."""
    record = read_record(store, WEIGHTS_KEY, _WEIGHTS)
    if record.run_id != job.run_id:
        raise RunDamagedError(
            f"{WEIGHTS_KEY} of the run at {store.url} is of run {record.run_id}; job.json is of run {job.run_id}.",
            "The folder holds files of several runs: restore it.",
        )
    if len(record.layers) != job.layers_run:
        raise RunDamagedError(
            f"{WEIGHTS_KEY} of the run at {store.url} is of {len(record.layers)} layers; a run as job.json has it loads {job.layers_run}.",
            f"Restore {WEIGHTS_KEY}.",
        )
    return record


_COMMIT = TypeAdapter(CommitRecord)
_SUMMARY = TypeAdapter(RunSummary)
_WEIGHTS = TypeAdapter(WeightsRecord)
