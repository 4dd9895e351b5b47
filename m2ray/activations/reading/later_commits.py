"""What a run's commits say by now, where a catalogue is of a while ago."""

from collections.abc import Collection
from typing import Any

import pyarrow.compute as pc

from m2ray.activations.manifest import MANIFEST_SCHEMA, manifest_table
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.records import commit_key, committed_shards, read_commit, read_commits
from m2ray.batches import PartReceipt, PartSpec
from m2ray.errors import StoreError


def parts_since(catalogue: Catalogue, spec: PartSpec, shards: Collection[int]) -> Any:
    """The parts of one site and layer in shards that are committed by now and not among `shards`: a table as `Catalogue.parts_of` gives.

    Raises:
        RunDamagedError: a commit cannot be understood.
        StoreError: the run cannot be read.
    """
    store, job = catalogue.store, catalogue.job
    fresh = sorted(committed_shards(store).difference(shards))
    try:
        parts = manifest_table(commit.columns() for commit in read_commits(store, job, fresh))
    except StoreError:
        if committed_shards(store).issuperset(fresh):
            raise
        return MANIFEST_SCHEMA.empty_table()  # a repair took a commit away: the next look finds the others
    is_layer = pc.is_null(parts["layer"]) if spec.layer is None else pc.equal(parts["layer"], spec.layer)
    return parts.filter(pc.and_(pc.equal(parts["site"], spec.site), is_layer)).combine_chunks()


def repaired(catalogue: Catalogue, spec: PartSpec, receipt: PartReceipt) -> PartReceipt | None:
    """What a shard's commit says by now of a part, if it is another attempt's that holds the same rows. Raises as `parts_since` does."""
    if catalogue.store.size(commit_key(receipt.shard)) is None:
        return None
    parts = read_commit(catalogue.store, catalogue.job, receipt.shard).receipts()
    (now,) = (part for part in parts if (part.site, part.layer) == (spec.site, spec.layer))
    return now if now.attempt != receipt.attempt and now.token_digest == receipt.token_digest else None
