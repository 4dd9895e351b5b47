"""The end of a run: the account closed, manifest.parquet written, what no record names deleted, and `_SUCCESS` last of all."""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from m2ray.activations.commit_table import Committed, read_committed
from m2ray.activations.job import SEQUENCE_FILE, JobRecord, utc_now
from m2ray.activations.manifest import MANIFEST_KEY, lost_parts, manifest_file, read_manifest
from m2ray.activations.records import SUCCESS_KEY, RunSummary, committed_shards, read_summary, swept_key
from m2ray.activations.schema import FORMAT_VERSION, parse_part_key, stored_parts
from m2ray.activations.statistics import are_whole, stored_contributions
from m2ray.activations.writing.merging import merge_statistics
from m2ray.errors import AlreadyExistsError, RunDamagedError, StageError
from m2ray.storage import Store

_SHOWN_PARTS, _SHOWN_SHARDS = 5, 20
_TRIES = 3
_MARKED_AT_ONCE = 8


class Finishing:
    """What a claimed run does once all its shards are committed, and how it is looked at whether it is finished."""

    def __init__(self, store: Store, job: JobRecord) -> None:
        self.store = store
        self.job = job
        self._committed = committed_shards(store)

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


def _say_the_same(recorded: RunSummary | None, now: RunSummary) -> bool:
    return recorded is not None and replace(recorded, finished_at=now.finished_at) == now


def _sizes(manifest: Any) -> dict[str, int]:
    """The bytes of each part by its key."""
    return dict(zip(manifest["key"].to_pylist(), manifest["num_bytes"].to_pylist(), strict=True))
