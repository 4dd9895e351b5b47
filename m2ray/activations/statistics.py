"""Statistics in the run folder: what each shard contributes while the run goes on, and at its end `statistics/` with its record.

A contribution is committed with its shard. Once `statistics.json` is there no contribution is needed any more, whichever shard it is of:
each shard is in `statistics/` once, also one that is extracted again later.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash
from pydantic import TypeAdapter
from safetensors import SafetensorError

from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import read_record, to_json
from m2ray.activations.records import read_commits
from m2ray.activations.schema import CONTRIBUTIONS, parse_contribution_key
from m2ray.batches import PartReceipt, SequenceFile
from m2ray.errors import RunDamagedError
from m2ray.statistics import NORM_BINS, Place
from m2ray.storage import Store

STATISTICS_KEY = "statistics.json"
FOLDER = "statistics"

RESTORE = f"Restore it from a copy. Or delete {STATISTICS_KEY}: the same extract command then extracts all shards again."
"""What is said of merged statistics that are damaged: what they were made of is deleted."""

Arrays = Mapping[str, npt.NDArray[Any]]
"""The statistics of one place by their kind. `moments` float64 [4, W]: mean, sum of squared deviations from it, minimum, maximum; `covariance`
[W, W], sums of the products of deviations; `norms` [NORM_BINS] and `experts` [E, E], counts."""

_FILE_NAME = re.compile(rf"{FOLDER}/(?:[^/.][^/]*/)*[^/.][^/]*\.(?:parquet|safetensors)")


@dataclass(frozen=True)
class StatisticsRecord:
    """`statistics.json`: the files of `statistics/`, which are of all the shards' rows. `rows` are those of each site and layer."""

    format_version: int
    run_id: str
    shards: int
    rows: int
    files: tuple[SequenceFile, ...]

    def to_json(self) -> bytes:
        return to_json(self, indent=2)


# -- contributions --------------------------------------------------------------------------------------------------------


def stored_contributions(store: Store, job: JobRecord) -> dict[str, int]:
    """Key and bytes of all that are stored of the run's shards, whether they count or not. Raises StoreError."""
    return {
        key: num_bytes for key, num_bytes in store.list(CONTRIBUTIONS) if (name := parse_contribution_key(key)) and name[0] < job.num_shards
    }


def lost_statistics(store: Store, job: JobRecord, shards: Iterable[int]) -> list[tuple[int, str]]:
    """(shard, key) of contributions that these shards' commits name and that are gone or have another size; none once they are merged.

    Raises:
        RunDamagedError, RunConflictError: a commit is not what it should be (`read_commit`).
        StoreError: something could not be read.
    """
    if not job.statistics or is_merged(store, job):
        return []
    commits = list(read_commits(store, job, sorted(shards)))
    stored = stored_contributions(store, job)  # listed after the commits were read: what they name was there before them
    return [(commit.shard, part.key) for commit in commits for part in commit.statistics if stored.get(part.key) != part.num_bytes]


def encode(statistics: Mapping[Place, Arrays]) -> bytes:
    """A safetensors file of a stage's statistics of a shard, a tensor for each place and kind: `residual.20.moments`.

    Of norms the bins that hold any, int64 [n, 2] with their counts; products of deviations as float32; pairs of experts as int32.
    """
    tensors = {}
    for (site, layer), arrays in statistics.items():
        for kind, values in arrays.items():
            tensors[f"{site}.{kind}" if layer is None else f"{site}.{layer}.{kind}"] = np.ascontiguousarray(_PACKED[kind](values))
    return safetensors.numpy.save(tensors)


def read_contribution(store: Store, receipt: PartReceipt) -> dict[Place, dict[str, npt.NDArray[Any]]]:
    """What a stage contributed. Raises RunDamagedError if it is not what was written, or StoreError."""
    data = store.read(receipt.key)
    try:
        if xxhash.xxh3_64_hexdigest(data) != receipt.xxh3:
            raise ValueError("it does not have the digest that its commit names")
        found: dict[Place, dict[str, npt.NDArray[Any]]] = {}
        for name, values in safetensors.numpy.load(data).items():
            site, *layer, kind = name.split(".")
            found.setdefault((site, int(layer[0]) if layer else None), {})[kind] = _UNPACKED[kind](values)
    except (ValueError, KeyError, SafetensorError) as error:
        remedy = "Run `m2ray verify --repair --checksums`, then the same extract command: it extracts the shard again."
        raise RunDamagedError(f"{store.where(receipt.key)} of shard {receipt.shard} is damaged: {error}.", remedy) from error
    return found


def _pack_norms(counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    bins = np.flatnonzero(counts)
    return np.stack([bins, counts[bins]], axis=1).astype(np.int64)


def _unpack_norms(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    counts = np.zeros(NORM_BINS, np.int64)
    counts[pairs[:, 0]] = pairs[:, 1]
    return counts


def _pack_products(sums: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return sums.astype(np.float32, copy=False)


def _pack_pairs(counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return counts.astype(np.int32)


_Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
_PACKED: Mapping[str, _Change] = {"moments": np.asarray, "covariance": _pack_products, "norms": _pack_norms, "experts": _pack_pairs}
_UNPACKED: Mapping[str, _Change] = {**dict.fromkeys(_PACKED, np.asarray), "norms": _unpack_norms}


def covariance_key(place: Place) -> str:
    """Where the covariance of a site and layer is kept: `statistics/covariance/site=residual/layer=020.safetensors`."""
    site, layer = place
    return f"{FOLDER}/covariance/site={site}" + ("" if layer is None else f"/layer={layer:03d}") + ".safetensors"


# -- the end --------------------------------------------------------------------------------------------------------------


def read_statistics_record(store: Store, job: JobRecord) -> StatisticsRecord | None:
    """The record of what was merged; None while nothing is. Raises RunDamagedError (not understood, another run's), RunConflictError or StoreError."""
    if store.size(STATISTICS_KEY) is None:
        return None
    record = read_record(store, STATISTICS_KEY, _RECORD)
    if record.run_id != job.run_id:
        what = f"{STATISTICS_KEY} of the run at {store.url} is of run {record.run_id}; job.json is of run {job.run_id}."
        raise RunDamagedError(what, "The folder holds files of several runs: restore it.")
    strange = [file.key for file in record.files if not _FILE_NAME.fullmatch(file.key)]
    if strange:
        what = f"{STATISTICS_KEY} of the run at {store.url} names {strange[0]!r}, which is no file of {FOLDER}/."
        raise RunDamagedError(what, RESTORE)
    return record


def is_merged(store: Store, job: JobRecord) -> bool:
    """Whether `statistics/` is made, so that no contribution is needed.

    Raises:
        RunDamagedError: it is not what its record says: of the contributions, which are deleted, it could not be made again.
        StoreError: something could not be read.
    """
    record = read_statistics_record(store, job)
    if record is None:
        return False
    gone = [store.where(file.key) for file in record.files if store.size(file.key) != file.num_bytes]
    if gone:
        raise RunDamagedError(f"Statistics of the run at {store.url} are gone or have another size than was written:", RESTORE, gone)
    return True


def are_whole(store: Store, job: JobRecord) -> bool:
    """Whether a run has all the statistics that it was asked for, and nothing is left of what they were made of. Raises as `is_merged`."""
    return not job.statistics or (is_merged(store, job) and not stored_contributions(store, job))


_RECORD = TypeAdapter(StatisticsRecord)
