"""StatisticsWriter: sums up what a stage's rows come to, shard by shard, and leaves one small object of each."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from m2ray.activations.schema import contribution_key
from m2ray.activations.statistics import encode
from m2ray.activations.writing.order import Order
from m2ray.activations.writing.summary import Summary
from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt
from m2ray.errors import StageError, raise_all
from m2ray.selection import Selection
from m2ray.statistics import STATISTICS, Place
from m2ray.storage import Store
from m2ray.storage.hashing import HashingFile

_DEFECT = "This is a defect of m2ray."


class _Attempt:
    """One stage's statistics of a shard so far."""

    def __init__(self, label: str, places: Iterable[Place]) -> None:
        self.summaries = {place: Summary() for place in places}
        self.order = Order(label, self.summaries)


class StatisticsWriter:
    """A writer of statistics. A micro-batch is merged where it is submitted; a shard's object is written when it is collected.

    Args:
        store: the run folder.
        places: the sites and layers of which the stage takes statistics, with their kinds; at least one.
        selection: whose rows they are of.
    """

    def __init__(self, store: Store, places: Mapping[Place, frozenset[str]], selection: Selection) -> None:
        self._store = store
        self._selection = selection
        self._places = dict(places)
        self._attempts: dict[tuple[int, str], _Attempt] = {}
        self._lock = threading.Lock()

    def submit(self, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float) -> None:
        """Merge what one micro-batch's statistics are, at all places or some, into its shard's. Raises StageError where it is out of order, or kinds lack."""
        found = {(layer.site, layer.layer): layer.statistics for layer in captured if layer.statistics}
        label = f"Statistics of shard {micro_batch.shard}, attempt {attempt}"
        if not {place: frozenset(arrays) for place, arrays in found.items()}.items() <= self._places.items():
            raise StageError(f"{label}: what came is not of the stage.", _DEFECT)
        with self._lock:
            opened = self._attempts.setdefault((micro_batch.shard, attempt), _Attempt(label, self._places))
        token_rows = self._selection.token_rows(micro_batch)
        opened.order.admit(micro_batch, found, token_rows)
        for place, arrays in found.items():
            opened.summaries[place].add(len(token_rows), arrays)

    def collect(self, shard: int, attempt: str, timeout_s: float) -> tuple[PartReceipt, ...]:
        """Write the shard's contribution.

        Raises:
            StoreError: it could not be written; nothing of it is left.
            StageError: the attempt is not complete, or values are so large that their squares are none.
        """
        with self._lock:
            opened = self._attempts.pop((shard, attempt), None)
        if opened is None or not opened.order.is_complete:
            raise StageError(f"Attempt {attempt} of shard {shard} is collected before its last micro-batch.", _DEFECT)
        raise_all([problem for place, summary in opened.summaries.items() for problem in _too_large(place, summary)])
        key = contribution_key(shard, attempt, *next(iter(self._places)))
        file = HashingFile(self._store.open_part(key))
        is_durable = False
        try:
            file.write(encode({place: summary.arrays for place, summary in opened.summaries.items()}))
            file.publish()
            is_durable = True
        finally:
            if not is_durable:
                file.abort()
        digest = opened.order.digest.hexdigest()
        return (PartReceipt(shard, attempt, STATISTICS, None, key, opened.order.rows, file.num_bytes, file.xxh3, digest),)

    def abandon(self, attempts: Iterable[tuple[int, str]], timeout_s: float = 60.0) -> None:
        """Forget each (shard, attempt): nothing of them is written before it is collected."""
        with self._lock:
            for each in attempts:
                self._attempts.pop(each, None)

    def close(self, timeout_s: float = 60.0) -> None:
        """Forget all that is not collected."""
        with self._lock:
            self._attempts.clear()


def _too_large(place: Place, summary: Summary) -> Iterator[StageError]:
    """Where float32 does not hold the squares of deviations: the largest of all sums of products are among them."""
    moments, products = summary.arrays.get("moments"), summary.arrays.get("covariance")
    sums = [] if moments is None else [moments[:2]]
    sums += [] if products is None else [np.diagonal(products)]
    if moments is not None and any((np.abs(each) > np.finfo(np.float32).max).any() or np.isnan(each).any() for each in sums):
        site, layer = place
        where = site if layer is None else f"{site} of layer {layer}"
        what = f"{where.capitalize()}: of values from {moments[2].min():g} to {moments[3].max():g} float32 holds no squares, and so no variance."
        yield StageError(what, "Leave moments and covariance of it out of the statistics.")
