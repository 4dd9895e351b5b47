"""The end of a run's statistics: the shards' contributions, merged in the order of the shards, become `statistics/`."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import xxhash

from m2ray.activations.job import JobRecord
from m2ray.activations.records import CommitRecord, read_commits
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.activations.statistics import (
    FOLDER,
    STATISTICS_KEY,
    Arrays,
    StatisticsRecord,
    covariance_key,
    is_merged,
    lost_statistics,
    read_contribution,
)
from m2ray.activations.writing.summary import Summary
from m2ray.batches import SequenceFile
from m2ray.errors import AlreadyExistsError, RunDamagedError
from m2ray.statistics import Place, norm_edges, places
from m2ray.storage import Store

_COVARIANCE_BYTES = 1 << 30
"""Of covariances that are merged at one time; for more of them the contributions are read again."""

_READ_AHEAD = 4
_SHOWN = 5

Summaries = Mapping[Place, Summary]


def merge_statistics(store: Store, job: JobRecord) -> None:
    """Make `statistics/` of the contributions of all shards, then its record; nothing where it is whole, or none were asked for. Safe to repeat.

    Raises:
        RunDamagedError: a contribution is gone, or is not what its commit says.
        StoreError: something could not be read or written.
    """
    if not job.statistics or is_merged(store, job):
        return
    lost = lost_statistics(store, job, range(job.num_shards))
    if lost:
        raise RunDamagedError(
            f"{len(lost):,} of the shards' statistics are gone or have another size than was committed:",
            "Run the same extract command again: it extracts their shards again.",
            [store.where(key) for _, key in lost[:_SHOWN]],
        )
    wanted = places(job.statistics)
    small = _merged(store, job, {place: kinds - {"covariance"} for place, kinds in wanted.items()})
    files = [_put_table(store, name, table) for name, table in _tables(small) if table.num_columns]
    with_covariance = [place for place, kinds in wanted.items() if "covariance" in kinds]
    at_once = max(1, _COVARIANCE_BYTES // (8 * job.model.hidden_size**2))
    for start in range(0, len(with_covariance), at_once):
        group = dict.fromkeys(with_covariance[start : start + at_once], frozenset({"moments", "covariance"}))
        files += [_put_covariance(store, place, summary) for place, summary in _merged(store, job, group).items()]
    record = StatisticsRecord(FORMAT_VERSION, job.run_id, job.num_shards, max(each.rows for each in small.values()), tuple(files))
    _create(store, STATISTICS_KEY, record.to_json())


# -- merging --------------------------------------------------------------------------------------------------------------


def _merged(store: Store, job: JobRecord, wanted: Mapping[Place, frozenset[str]]) -> dict[Place, Summary]:
    """These kinds at these places, over all shards."""
    summaries = {place: Summary() for place in wanted}
    for commit, found in _contributions(store, job):
        for place, kinds in wanted.items():
            arrays: Arrays = found.get(place, {})
            if not kinds <= arrays.keys():
                raise RunDamagedError(
                    f"Shard {commit.shard} of the run at {store.url} has no {', '.join(sorted(kinds - arrays.keys()))} of {place}.",
                    "This is a defect of m2ray.",
                )
            summaries[place].add(commit.rows, {kind: arrays[kind] for kind in kinds})
    return summaries


def _contributions(store: Store, job: JobRecord) -> Iterator[tuple[CommitRecord, dict[Place, dict[str, npt.NDArray[Any]]]]]:
    """Each shard's commit and what its stages contributed, in the order of the shards, a few read ahead."""

    def read(commit: CommitRecord) -> tuple[CommitRecord, dict[Place, dict[str, npt.NDArray[Any]]]]:
        return commit, {place: arrays for each in commit.contributions() for place, arrays in read_contribution(store, each).items()}

    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="statistics") as pool:
        ahead: deque[Future[Any]] = deque()
        try:
            for commit in read_commits(store, job, range(job.num_shards)):
                ahead.append(pool.submit(read, commit))
                if len(ahead) > _READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# -- tables and matrices --------------------------------------------------------------------------------------------------


def _tables(summaries: Summaries) -> Iterator[tuple[str, Any]]:
    """Every table of `statistics/` by its name."""
    yield "moments", _table(_moments(place, each) for place, each in summaries.items() if "moments" in each.arrays)
    yield "norms", _table(_norms(place, each) for place, each in summaries.items() if "norms" in each.arrays)
    experts = [(place, each) for place, each in summaries.items() if "experts" in each.arrays]
    yield "experts", _table(_experts(place, each) for place, each in experts)
    yield "coactivation", _table(_pairs(place, each) for place, each in experts)


def _table(of_places: Iterable[Any]) -> Any:
    tables = list(of_places)
    return pa.concat_tables(tables) if tables else pa.table({})


def _of(place: Place, columns: Mapping[str, npt.NDArray[Any]]) -> Any:
    """A table of one place: its site and layer in front of the columns."""
    site, layer = place
    num_rows = len(next(iter(columns.values())))
    sites, layers = pa.array([site] * num_rows, pa.string()), pa.array([layer] * num_rows, pa.int32())
    return pa.table({"site": sites, "layer": layers, **columns})


def _moments(place: Place, summary: Summary) -> Any:
    """`variance` is of the rows themselves: over their count, not one less."""
    mean_W, squares_W, smallest_W, largest_W = summary.arrays["moments"]
    return _of(
        place,
        {
            "channel": np.arange(len(mean_W), dtype=np.int32),
            "count": np.full(len(mean_W), summary.rows, np.int64),
            "mean": mean_W,
            "variance": squares_W / max(1, summary.rows),
            "min": smallest_W.astype(np.float32),
            "max": largest_W.astype(np.float32),
        },
    )


def _norms(place: Place, summary: Summary) -> Any:
    bins, edges = np.flatnonzero(summary.arrays["norms"]), norm_edges()
    return _of(place, {"at_least": edges[bins], "below": edges[bins + 1], "rows": summary.arrays["norms"][bins]})


def _experts(place: Place, summary: Summary) -> Any:
    load_E = np.diagonal(summary.arrays["experts"]).copy()
    return _of(place, {"expert": np.arange(len(load_E), dtype=np.int32), "rows": load_E})


def _pairs(place: Place, summary: Summary) -> Any:
    one, other = np.nonzero(np.triu(summary.arrays["experts"], 1))
    return _of(place, {"expert": one.astype(np.int16), "other": other.astype(np.int16), "rows": summary.arrays["experts"][one, other]})


def _put_table(store: Store, name: str, table: Any) -> SequenceFile:
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression="zstd", use_dictionary=["site", "layer"])
    return _put(store, f"{FOLDER}/{name}.parquet", file.getvalue().to_pybytes(), len(table))


def _put_covariance(store: Store, place: Place, summary: Summary) -> SequenceFile:
    covariance_WW = (summary.arrays["covariance"] / max(1, summary.rows)).astype(np.float32)
    data = safetensors.numpy.save({"covariance": covariance_WW, "mean": np.ascontiguousarray(summary.arrays["moments"][0])})
    return _put(store, covariance_key(place), data, len(covariance_WW))


def _put(store: Store, key: str, data: bytes, rows: int) -> SequenceFile:
    _create(store, key, data)
    return SequenceFile(key, rows, len(data), xxhash.xxh3_64_hexdigest(data))


def _create(store: Store, key: str, data: bytes) -> None:
    """Replaces only what has other bytes: an earlier end of the run was cut off there, or another driver's is at it, and writes the same."""
    try:
        store.create(key, data)
    except AlreadyExistsError:
        if store.read(key) != data:
            store.put(key, data)
