"""All that the commits of a run name, as one table: of a large run hundreds of thousands of parts, too many to be objects of Python.

Arrow takes commits apart that are just what m2ray writes. Any other is read as `read_commit` reads it, which says what is wrong.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import is_sealed, to_json
from m2ray.activations.manifest import MANIFEST_SCHEMA, sorted_parts
from m2ray.activations.records import commit_key, read_commit
from m2ray.activations.schema import FORMAT_VERSION, part_folder, part_name
from m2ray.errors import RunDamagedError
from m2ray.storage import Store

_PARTS_A_TASK = 1024
_FILES_AT_ONCE, _REQUESTS_AT_ONCE = 4, 64
_PARSED_AT_ONCE = 2
"""Few: each thread that Arrow allocates in keeps memory of its own."""

_OF_A_PART = ("site", "layer", "key", "num_bytes", "xxh3", "tail_bytes", "tail_xxh3")
_COMMIT = pa.schema(
    [
        ("format_version", pa.int64()),
        ("run_id", pa.string()),
        ("num_sequences", pa.int64()),
        *((field.name, field.type) for field in MANIFEST_SCHEMA if field.name not in _OF_A_PART),
        ("micro_batches", pa.list_(pa.list_(pa.int64()))),
        ("elapsed_s", pa.float64()),
        ("committed_at", pa.string()),
        ("computed_on", pa.string()),
        ("parts", pa.list_(pa.struct([(name, MANIFEST_SCHEMA.field(name).type) for name in _OF_A_PART]))),
    ]
)
_Done = TypeVar("_Done")

_LAYERS = 1 << 32
"""More than a model has: a site's number times this and a layer's number are one number."""


class Committed(NamedTuple):
    """What some commits say: `parts` as a table of MANIFEST_SCHEMA, sorted as a manifest is; the shards, sequences and rows that they are of."""

    parts: Any
    num_shards: int
    num_sequences: int
    num_rows: int


def read_committed(store: Store, job: JobRecord, shards: Iterable[int]) -> Committed:
    """The commits of these shards, several read at a time.

    Raises:
        RunDamagedError, RunConflictError: one of them is not what it should be (`read_commit`).
        StoreError: one cannot be read.
    """
    numbers = sorted(shards)
    step = max(1, _PARTS_A_TASK // max(1, len(job.parts)))
    tasks = [numbers[start : start + step] for start in range(0, len(numbers), step)]
    at_once = _REQUESTS_AT_ONCE if store.folder is None else _FILES_AT_ONCE
    with ThreadPoolExecutor(at_once, thread_name_prefix="commits") as reading, ThreadPoolExecutor(_PARSED_AT_ONCE) as parsing:
        try:
            read = _ahead(reading, partial(_read, store), at_once, tasks)
            found = list(_ahead(parsing, partial(_table, store, job, _Kinds(job)), 2 * _PARSED_AT_ONCE, tasks, read))
        finally:
            reading.shutdown(cancel_futures=True)
            parsing.shutdown(cancel_futures=True)
    num_sequences, num_rows = (sum(each[place] for each in found) for place in (1, 2))
    batches = [parts for parts, _, _ in found]
    found.clear()  # sorting frees what it has sorted
    return Committed(sorted_parts(batches), len(numbers), num_sequences, num_rows)


class _Kinds:
    """The sites and layers of a job, each as a number, and where its parts lie."""

    def __init__(self, job: JobRecord) -> None:
        self.sites = pa.array(sorted({part.site for part in job.parts}), pa.string())
        of_sites = {site: number for number, site in enumerate(self.sites.to_pylist())}
        places = {of_sites[part.site] * _LAYERS + (-1 if part.layer is None else part.layer): part_folder(part) for part in job.parts}
        self.numbers = np.array(sorted(places), np.int64)
        self.folders = pa.array([places[number] for number in sorted(places)], pa.string())

    def of(self, sites: Any, layers: Any) -> Any:
        """The place in `numbers` of each part; None if one is of no kind."""
        of_sites = pc.fill_null(pc.index_in(sites, value_set=self.sites), -1).to_numpy().astype(np.int64)
        numbers = of_sites * _LAYERS + layers.fill_null(-1).to_numpy()
        found = np.searchsorted(self.numbers, numbers).clip(max=len(self.numbers) - 1)
        return found if np.array_equal(self.numbers[found], numbers) else None


def _ahead(pool: ThreadPoolExecutor, work: Callable[..., _Done], at_once: int, *arguments: Iterable[Any]) -> Iterator[_Done]:
    """`pool.map` that takes no more than `at_once` ahead: what is read would else pile up before those that parse it, all commits of a run."""
    waiting: deque[Future[_Done]] = deque()
    for some in zip(*arguments, strict=True):
        waiting.append(pool.submit(work, *some))
        if len(waiting) >= at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(store: Store, numbers: Sequence[int]) -> list[bytes]:
    return [store.read(commit_key(number)) for number in numbers]


def _table(store: Store, job: JobRecord, kinds: _Kinds, numbers: Sequence[int], data: Sequence[bytes]) -> tuple[Any, int, int]:
    """The parts of some shards as a RecordBatch, and how many sequences and rows they have; `data` is their commits' bytes."""
    commits = _parsed(data) if all(map(is_sealed, data)) else None
    if commits is None or not _are_plain(commits, job, kinds, numbers):
        commits = _parsed([to_json(read_commit(store, job, number)) for number in numbers])
    if commits is None:
        raise RunDamagedError(
            f"A commit of shards {numbers[0]} to {numbers[-1]} of the run at {store.url} has a number of more than 64 bits.", "Restore it."
        )
    return _parts(commits), *(pc.sum(commits[name]).as_py() for name in ("num_sequences", "rows"))


def _parsed(data: Sequence[bytes]) -> Any:
    """Commits as a RecordBatch; None if they have not the fields that they should have."""
    lines = b"\n".join(data)
    read, parse = pj.ReadOptions(use_threads=False, block_size=len(lines) + 1), pj.ParseOptions(_COMMIT, unexpected_field_behavior="ignore")
    try:
        (commits,) = pj.read_json(pa.BufferReader(lines), read, parse).to_batches()
    except (pa.ArrowInvalid, ValueError):
        return None
    return commits


def _are_plain(commits: Any, job: JobRecord, kinds: _Kinds, numbers: Sequence[int]) -> bool:
    """Whether these are commits of this run, shard for shard, each with one part of each kind in the place where it belongs."""
    count, told = len(numbers), (commits["format_version"], commits["run_id"], commits["shard"])
    wanted = ([FORMAT_VERSION] * count, [job.run_id] * count, list(numbers))
    if tuple(column.to_pylist() for column in told) != wanted or not _are_whole(commits):
        return False
    if not np.array_equal(pc.list_value_length(commits["parts"]).to_numpy(), np.full(count, len(kinds.numbers))):
        return False
    parts = commits["parts"].flatten()
    if not len(kinds.numbers):  # a run of statistics alone
        return True
    if any(parts.field(name).null_count for name in _OF_A_PART if not MANIFEST_SCHEMA.field(name).nullable):
        return False
    found = kinds.of(parts.field("site"), parts.field("layer"))
    if found is None or (np.sort(found.reshape(count, -1), axis=1) != np.arange(len(kinds.numbers))).any():
        return False
    names = pa.array(map(part_name, numbers, commits["attempt"].to_pylist()), pa.string()).take(_shards_of(commits))
    return bool(parts.field("key").equals(pc.binary_join_element_wise(kinds.folders.take(pa.array(found)), names, "/")))


def _are_whole(commits: Any) -> bool:
    """Whether nothing is null but what may be, and each micro-batch has its two numbers."""
    batches = commits["micro_batches"].flatten()
    if any(commits[name].null_count for name in commits.schema.names if name != "computed_on") or batches.null_count:
        return False
    return bool((pc.list_value_length(batches).to_numpy() == 2).all()) and not batches.flatten().null_count


def _parts(commits: Any) -> Any:
    """A row of MANIFEST_SCHEMA for each part."""
    shards, parts = _shards_of(commits), commits["parts"].flatten()
    columns = [parts.field(name) if name in _OF_A_PART else commits[name].take(shards) for name in MANIFEST_SCHEMA.names]
    return pa.RecordBatch.from_arrays(columns, schema=MANIFEST_SCHEMA)


def _shards_of(commits: Any) -> Any:
    """The row of `commits` that each part is of."""
    return pa.array(np.repeat(np.arange(len(commits)), pc.list_value_length(commits["parts"]).to_numpy()))
