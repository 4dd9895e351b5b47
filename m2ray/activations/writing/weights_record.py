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


def hold_weights(store: Store, job: JobRecord, loaded: Mapping[int | None, str]) -> None:
    """Record what a chain has loaded, or hold it against what the run's record says. To be called before the chain's first row.

    Args:
        loaded: the digest of each of the chain's layers, and at None that of what runs before the first one.

    Raises:
        RunConflictError: the chain has loaded other weights than the run's rows come from, named by layer; or rows were committed
            by an m2ray that did not record its weights.
        RunDamagedError: weights.json is not understood, or another run's.
        StoreError: it cannot be written or read.
    """
    layers = tuple(digest for _, digest in sorted((layer, digest) for layer, digest in loaded.items() if layer is not None))
    found = WeightsRecord(FORMAT_VERSION, job.run_id, loaded[None], layers)
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
    _require_same(store, read_weights(store, job), found)


def _require_same(store: Store, recorded: WeightsRecord, found: WeightsRecord) -> None:
    numbers = range(max(len(recorded.layers), len(found.layers)))
    differing = [layer for layer in numbers if recorded.layers[layer : layer + 1] != found.layers[layer : layer + 1]]
    words = ["the embedding"] if recorded.embedding != found.embedding else []
    words += [f"layer{'s' if len(differing) > 1 else ''} {in_ranges(differing)}"] if differing else []
    if words:
        raise RunConflictError(
            f"The weights that the stages have loaded are not those of the run at {store.url}: {' and '.join(words)} of "
            f"{len(found.layers)} layers differ from what its {WEIGHTS_KEY} says.",
            "Put the files back with which the run began, on every node, or give another output.",
        )
