"""Verify: is every file of a run what its commit says? Read in parallel, in bounded memory."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import xxhash

from m2ray.activations import audits
from m2ray.activations.job import JobRecord, read_job
from m2ray.activations.manifest import MANIFEST_KEY, manifest_table, read_manifest, receipts_of
from m2ray.activations.reading.part_reader import PartReader
from m2ray.activations.reading.verify_statistics import named_files, problems_of_statistics
from m2ray.activations.records import (
    SUCCESS_KEY,
    WEIGHTS_KEY,
    commit_key,
    committed_and_void,
    committed_shards,
    read_commit,
    read_summary,
    read_weights,
)
from m2ray.activations.schema import CONTRIBUTIONS, parse_part_key
from m2ray.activations.statistics import FOLDER as STATISTICS_FOLDER
from m2ray.batches import PartReceipt, PartSpec
from m2ray.errors import RunDamagedError, StoreError
from m2ray.selection import NO_TOKEN, Selection
from m2ray.sequences import read_sequences
from m2ray.storage import Store

_FOLDERS = ("data", "sequences", "_commits", audits.FOLDER, CONTRIBUTIONS, STATISTICS_FOLDER)
_LISTED_AT_ONCE = 1024


@dataclass(frozen=True)
class Damage:
    """A file that is not what it should be. `shard` is the one to extract again; None for files of the whole run."""

    key: str
    shard: int | None
    problem: str


OnProgress = Callable[[int, int, int, int], object]
"""Takes the parts looked at and all of them, then the bytes of both."""


@dataclass(frozen=True)
class Verification:
    """What was found. `files` and `num_bytes` are those of the committed parts.

    `unnamed` are (key, bytes) of the files below `data/`, `sequences/`, `_commits/`, `audit/`, `_statistics/` and `statistics/` that no record names, and are none. In a run that is not complete
    most of them are of shards that are not committed; in a complete one they are in the way of whoever reads it by a glob.
    """

    job: JobRecord
    is_complete: bool
    files: int
    num_bytes: int
    damages: tuple[Damage, ...]
    unnamed: tuple[tuple[str, int], ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged, and a glob over a complete run finds each row once."""
        return not self.damages and not (self.is_complete and any(key.endswith(".parquet") for key, _ in self.unnamed))

    @property
    def damaged_shards(self) -> tuple[int, ...]:
        """The shards that extracting them again would heal, ascending."""
        return tuple(sorted({damage.shard for damage in self.damages if damage.shard is not None}))


def verify(store: Store, *, checksums: bool, threads: int = 8, on_progress: OnProgress = lambda *_: None) -> Verification:
    """Look at every file of a run that counts.

    Always: records, audits among them, agree and have the digests that they name, and each part's size, page indexes, footer and number of rows are those
    of its commit. With `checksums` also every byte of each part, the token digest, taken again from the columns, and, if nothing else is
    damaged, each prompt's digest. Files that no record names are listed, not read.

    Args:
        store: the run folder.
        checksums: read every byte.
        threads: parts read at the same time; each takes some MiB and its token columns, 16 bytes a row.
        on_progress: called on the caller's thread after each part.

    Raises:
        StoreError: there is no run, or a file cannot be read for a reason that says nothing of its content.
        RunDamagedError: job.json cannot be understood.
        RunConflictError: a newer m2ray wrote it.
    """
    job = read_job(store)
    if job is None:
        raise StoreError(f"There is no run at {store.url}: it has no job.json.", "Check the path.")
    damages: list[Damage] = []
    stored = [(key, num_bytes) for folder in _FOLDERS for key, num_bytes in store.list(folder)]  # before the commits that name them
    parts = manifest_table(_sound_commits(store, job, damages))
    is_complete = store.size(SUCCESS_KEY) is not None
    if is_complete:
        damages += _damages_of_summary(store, job, parts, commits_are_sound=not damages)
    without_commit = {damage.shard for damage in damages if damage.key == commit_key(damage.shard or 0)}
    committed = committed_shards(store)
    named = {*parts["key"].to_pylist(), *audits.audit_keys(store), *named_files(store, job, committed)}
    unnamed = tuple(_unnamed(job, stored, named, without_commit))
    damages += [
        *_damages_of_weights(store, job, has_commits=bool(committed)),
        *_damages_of_sequences(store, job),
        *_damages_of_audits(store, job),
        *(Damage(*problem) for problem in problems_of_statistics(store, job, committed, checksums=checksums)),
    ]
    all_bytes = sum(parts["num_bytes"].to_pylist())
    files, num_bytes = 0, 0
    for receipt, damage in _checked_parts(store, job, parts, threads, checksums=checksums):
        files, num_bytes = files + 1, num_bytes + receipt.num_bytes
        damages += [damage] if damage else []
        on_progress(files, len(parts), num_bytes, all_bytes)
    if checksums and job.parts and not damages:
        damages += _damages_of_tokens(store, job, parts)
    return Verification(job, is_complete, len(parts), all_bytes, tuple(damages), unnamed)


def _unnamed(
    job: JobRecord, stored: Iterable[tuple[str, int]], named: Collection[str], without_commit: Collection[int | None]
) -> Iterator[tuple[str, int]]:
    """Those of the stored files that no record names. Parts of a shard whose commit is gone or cannot be understood are left out."""
    named = {*named, *(file.key for file in job.sequence_files), *map(commit_key, range(job.num_shards))}
    for key, num_bytes in sorted(stored):
        part = parse_part_key(key)
        if key not in named and not (part and part[0] in without_commit):
            yield key, num_bytes


def _sound_commits(store: Store, job: JobRecord, damages: list[Damage]) -> Iterator[dict[str, list[Any]]]:
    committed, void = committed_and_void(store)
    for shard in sorted(void):
        came_late = "came after the parts that it names had been swept: it does not count."
        damages.append(Damage(commit_key(shard), shard, f"{store.where(commit_key(shard))} {came_late}"))
    for shard in sorted(committed):
        try:
            yield read_commit(store, job, shard).columns()
        except RunDamagedError as error:
            damages.append(Damage(commit_key(shard), shard, error.what))


def _damages_of_summary(store: Store, job: JobRecord, parts: Any, *, commits_are_sound: bool) -> list[Damage]:
    """What is wrong with the records of a finished run. `parts` are what the commits say."""
    absent = sorted(set(range(job.num_shards)).difference(*committed_and_void(store)))
    damages = [
        Damage(commit_key(shard), shard, f"{store.where(commit_key(shard))} is absent, though the run is finished.") for shard in absent
    ]
    try:
        summary = read_summary(store)
    except RunDamagedError as error:
        return [*damages, Damage(SUCCESS_KEY, None, error.what)]
    try:
        manifest = read_manifest(store, job, summary.parts if summary else len(parts))
    except (RunDamagedError, StoreError) as error:
        return [*damages, Damage(MANIFEST_KEY, None, error.what)]
    if commits_are_sound and not absent and not manifest.equals(parts):
        damages.append(Damage(MANIFEST_KEY, None, f"{store.where(MANIFEST_KEY)} does not say what the commits say."))
    return damages


def _damages_of_weights(store: Store, job: JobRecord, *, has_commits: bool) -> Iterator[Damage]:
    """Runs have the record since format 2, before their first row."""
    if store.size(WEIGHTS_KEY) is None:
        if has_commits and job.format_version > 1:
            yield Damage(WEIGHTS_KEY, None, f"{store.where(WEIGHTS_KEY)} is absent: which weights the rows come from is not known.")
        return
    try:
        read_weights(store, job)
    except RunDamagedError as error:
        yield Damage(WEIGHTS_KEY, None, error.what)


def _damages_of_sequences(store: Store, job: JobRecord) -> Iterator[Damage]:
    for file in job.sequence_files:
        try:
            read_sequences(store, file, columns=[])
        except RunDamagedError as error:
            yield Damage(file.key, None, error.what)


def _damages_of_audits(store: Store, job: JobRecord) -> Iterator[Damage]:
    for key in audits.audit_keys(store):
        try:
            audits.read_audit(store, job, key)
        except RunDamagedError as error:
            yield Damage(key, None, error.what)


def _checked_parts(
    store: Store, job: JobRecord, parts: Any, threads: int, *, checksums: bool
) -> Iterator[tuple[PartReceipt, Damage | None]]:
    """Each part and what is wrong with it, in the order of the table, `threads` at a time."""
    specs = {(spec.site, spec.layer): spec for spec in job.parts}

    def check(receipt: PartReceipt) -> tuple[PartReceipt, Damage | None]:
        problem = _problem_of_part(store, job, specs[receipt.site, receipt.layer], receipt, checksums=checksums)
        return receipt, Damage(receipt.key, receipt.shard, problem) if problem else None

    receipts = (receipt for start in range(0, len(parts), _LISTED_AT_ONCE) for receipt in receipts_of(parts.slice(start, _LISTED_AT_ONCE)))
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            yield from _in_order(pool, check, receipts, 2 * threads)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    check: Callable[[PartReceipt], tuple[PartReceipt, Damage | None]],
    receipts: Iterable[PartReceipt],
    at_once: int,
) -> Iterator[tuple[PartReceipt, Damage | None]]:
    """`pool.map` that takes no more than `at_once` receipts ahead."""
    waiting: deque[Future[tuple[PartReceipt, Damage | None]]] = deque()
    for receipt in receipts:
        waiting.append(pool.submit(check, receipt))
        if len(waiting) >= at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _problem_of_part(store: Store, job: JobRecord, spec: PartSpec, receipt: PartReceipt, *, checksums: bool) -> str | None:
    try:
        reader = PartReader(store, spec, job.run_metadata(), receipt)
        if checksums:
            reader.require_whole()
    except RunDamagedError as error:
        return error.what
    return None


def _damages_of_tokens(store: Store, job: JobRecord, parts: Any) -> Iterator[Damage]:
    """Shards whose tokens are not those that `sequences/` says, each by its first part: they have other digests, or, where tokens were chosen,
    other numbers of rows, or places that the sequence does not have.
    """
    spec = job.parts[0]
    of_spec = pc.and_(
        pc.equal(parts["site"], spec.site), pc.equal(parts["layer"], spec.layer) if spec.layer is not None else pc.is_null(parts["layer"])
    )
    receipts = {receipt.shard: receipt for receipt in receipts_of(parts.filter(of_spec))}
    for file in job.sequence_files:
        try:
            table = read_sequences(store, file, ["sequence_id", "prompt_digest", "token_count", "row_count", "shard"])
        except RunDamagedError as error:  # it was sound a while ago
            yield Damage(file.key, None, error.what)
            continue
        table = table.filter(pc.is_valid(table["shard"])).sort_by([("shard", "ascending"), ("sequence_id", "ascending")])
        shards, starts = np.unique(table["shard"].to_numpy(), return_index=True)
        for shard, start, stop in zip(shards.tolist(), starts, [*starts[1:], len(table)], strict=True):
            if shard in receipts:
                tokens = PartReader(store, spec, job.run_metadata(), receipts[shard]).tokens()
                of_shard = table.slice(start, stop - start)
                are_right = _are_of_prompts(tokens, of_shard) if job.selection.is_all else _are_chosen_of(tokens, of_shard, job.selection)
                if not are_right:
                    key = receipts[shard].key
                    yield Damage(key, shard, f"{store.where(key)} holds other tokens than {file.key} says that the prompts had.")


def _are_of_prompts(tokens: npt.NDArray[Any], sequences: Any) -> bool:
    """Whether TOKEN_ROW [N] are all tokens of a shard's sequences, rows of `sequences/`."""
    found = _prompt_digests(tokens)
    recorded = zip(sequences["sequence_id"].to_pylist(), sequences["prompt_digest"].to_pylist(), strict=True)
    return all(found.get(sequence_id) == digest for sequence_id, digest in recorded)


def _are_chosen_of(tokens: npt.NDArray[Any], sequences: Any, selection: Selection) -> bool:
    """Whether they can be tokens chosen of a shard's sequences: as many of each, at ascending places that it has; or means of it."""
    ids, token_counts, row_counts = (sequences[name].to_numpy() for name in ("sequence_id", "token_count", "row_count"))
    if not np.array_equal(tokens["sequence_id"], np.repeat(ids, row_counts)):
        return False
    positions = tokens["position"]
    if selection.is_mean:
        return bool((positions == NO_TOKEN).all() and (tokens["token_id"] == NO_TOKEN).all())
    ascend = (np.diff(positions) > 0) | (np.diff(tokens["sequence_id"]) > 0)
    return bool(ascend.all() and (positions >= 0).all() and (positions < np.repeat(token_counts, row_counts)).all())


def _prompt_digests(tokens: npt.NDArray[Any]) -> dict[int, str]:
    """The digest of each sequence's token ids, of TOKEN_ROW [N]."""
    ids, starts = np.unique(tokens["sequence_id"], return_index=True)
    pieces = np.split(np.ascontiguousarray(tokens["token_id"]), starts[1:])
    return {number: xxhash.xxh3_128_hexdigest(piece.data) for number, piece in zip(ids.tolist(), pieces, strict=True)}
