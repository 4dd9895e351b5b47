"""The driver's side of `weights.json`: what a chain has loaded is recorded before the first row, and held against it ever after.

The fingerprint in job.json is of a checkpoint's names, sizes and headers, which two checkpoints of one kind share; this is of what was loaded.
"""

from collections.abc import Mapping

from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import to_json
from m2ray.activations.records import WEIGHTS_KEY, WeightsRecord, committed_shards, read_weights
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.errors import AlreadyExistsError, RunConflictError, in_ranges
from m2ray.storage import Store


def hold_weights(store: Store, job: JobRecord, loaded: Mapping[int | None, str], files: Mapping[str, str] | None = None) -> None:
    """Record what a chain has loaded, or hold it against what the run's record says. To be called before the chain's first row.

    Args:
        loaded: the digest of each of the chain's layers, and at None that of what runs before the first one.
        files: what changes when one of the model's files is written anew, by name, from before they were loaded; None where that is not known.

    Raises:
        RunConflictError: the chain has loaded other weights than the run's rows come from, named by layer; or rows were committed
            by an m2ray that did not record its weights.
        RunDamagedError: weights.json is not understood, or another run's.
        StoreError: it cannot be written or read.
    """
    layers = tuple(digest for _, digest in sorted((layer, digest) for layer, digest in loaded.items() if layer is not None))
    found = WeightsRecord(FORMAT_VERSION, job.run_id, loaded[None], layers, files or {})
    # In this order: whoever commits has created the record before.
    has_rows = bool(committed_shards(store))
    if store.size(WEIGHTS_KEY) is None:
        if has_rows:
            what = f"The run at {store.url} has committed shards and no {WEIGHTS_KEY}: which weights they come from is not known."
            raise RunConflictError(what, "Restore that file if it was deleted; a run of an earlier m2ray has none: give another output.")
        try:
            store.create(WEIGHTS_KEY, to_json(found, 2))
        except AlreadyExistsError:
            pass  # another chain was first
        else:
            return
    _require_same(store, job, {**dict.fromkeys(range(job.layers_run), ""), **loaded}, "The weights that the stages have loaded")


def require_weights(store: Store, job: JobRecord, found: Mapping[int | None, str]) -> None:
    """Hold weights that nobody loads against the run's record: of a run in which nothing is missing.

    Args:
        found: the digests of some layers, and at None that of what runs before the first one.

    Raises:
        RunConflictError: they are not the run's, named by layer.
        RunDamagedError: weights.json is not understood, or another run's.
        StoreError: it cannot be read, or is gone.
    """
    _require_same(store, job, found, "The model's weights")


def _require_same(store: Store, job: JobRecord, found: Mapping[int | None, str], whose: str) -> None:
    recorded = read_weights(store, job)
    of_record: dict[int | None, str] = {None: recorded.embedding}
    of_record.update(enumerate(recorded.layers))
    differing = [layer for layer, digest in found.items() if of_record.get(layer) != digest]
    layers = sorted(layer for layer in differing if layer is not None)
    words = ["the embedding"] if None in differing else []
    words += [f"layer{'s' if len(layers) > 1 else ''} {in_ranges(layers)}"] if layers else []
    if words:
        raise RunConflictError(
            f"{whose} are not those of the run at {store.url}: {' and '.join(words)} of "
            f"{len(recorded.layers)} layers differ from what its {WEIGHTS_KEY} says.",
            "Put the files back with which the run began, on every node, or give another output.",
        )
