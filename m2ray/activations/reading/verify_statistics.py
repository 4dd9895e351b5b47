"""Is what a run has of statistics what its records say: `statistics/`, or, before it is made, what the shards left for it?"""

from collections.abc import Iterable, Iterator
from contextlib import suppress

import xxhash

from m2ray.activations.job import JobRecord
from m2ray.activations.records import SUCCESS_KEY, read_commit
from m2ray.activations.statistics import RESTORE, STATISTICS_KEY, read_statistics_record, stored_contributions
from m2ray.errors import RunDamagedError
from m2ray.storage import Store

Problem = tuple[str, int | None, str]
"""A key, the shard that would heal it, and what is wrong with it."""


def problems_of_statistics(store: Store, job: JobRecord, shards: Iterable[int], *, checksums: bool) -> Iterator[Problem]:
    """What is wrong, of a run with these shards committed. Raises StoreError."""
    if not job.statistics:
        return
    try:
        record = read_statistics_record(store, job)
    except RunDamagedError as error:
        yield STATISTICS_KEY, None, error.what
        return
    if record is None:
        if store.size(SUCCESS_KEY) is not None:
            yield STATISTICS_KEY, None, f"{store.where(STATISTICS_KEY)} is absent, though the run is finished."
        yield from _of_shards(store, job, shards, checksums=checksums)
        return
    for file in record.files:
        problem = _problem(store, file.key, store.size(file.key), file.num_bytes, file.xxh3, checksums=checksums)
        if problem:
            yield file.key, None, f"{problem} {RESTORE}"


def _of_shards(store: Store, job: JobRecord, shards: Iterable[int], *, checksums: bool) -> Iterator[Problem]:
    stored = stored_contributions(store, job)
    for shard in sorted(shards):
        with suppress(RunDamagedError):  # a commit that is damaged is named as such
            for part in read_commit(store, job, shard).statistics:
                problem = _problem(store, part.key, stored.get(part.key), part.num_bytes, part.xxh3, checksums=checksums)
                if problem:
                    yield part.key, shard, problem


def named_files(store: Store, job: JobRecord, shards: Iterable[int]) -> set[str]:
    """The keys of statistics that a record names and that are needed."""
    if not job.statistics:
        return set()
    named: set[str] = set()
    with suppress(RunDamagedError):
        record = read_statistics_record(store, job)
        if record is not None:
            return {file.key for file in record.files}
    for shard in shards:
        with suppress(RunDamagedError):
            named.update(part.key for part in read_commit(store, job, shard).statistics)
    return named


def _problem(store: Store, key: str, found_bytes: int | None, num_bytes: int, xxh3: str, *, checksums: bool) -> str | None:
    if found_bytes is None:
        return f"{store.where(key)} is absent."
    if found_bytes != num_bytes:
        return f"{store.where(key)} has {found_bytes:,} bytes; {num_bytes:,} were written."
    if checksums and xxhash.xxh3_64_hexdigest(store.read(key)) != xxh3:
        return f"{store.where(key)} does not have the xxh3 that was recorded."
    return None
