"""Which sequences an audit looks at, what went through the model with them, and what that many would have found."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp, lgamma

import numpy as np
import numpy.typing as npt

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.records import read_commits
from m2ray.batches import Int64Array, Shard
from m2ray.errors import NotInRunError, RunDamagedError
from m2ray.prompts import load_shards

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """Committed sequences, drawn without putting back.

    Attributes:
        sequence_ids: int64 [S], ascending.
        of_sequences: that were committed.
        micro_batches: those of the run that any of them went through the model in, each as the piece of its shard that it was.
        computed_on: the kinds of machine that those were computed on, as their commits say (CommitRecord.computed_on).
    """

    sequence_ids: Int64Array
    of_sequences: int
    micro_batches: tuple[Shard, ...]
    computed_on: frozenset[str | None]

    def places_in(self, sequence_ids: Int64Array) -> npt.NDArray[np.intp]:
        """Which of some sequences were drawn: their places, ascending."""
        nearest = np.minimum(np.searchsorted(self.sequence_ids, sequence_ids), len(self.sequence_ids) - 1)
        return np.flatnonzero(self.sequence_ids[nearest] == sequence_ids)

    def alone(self) -> tuple[Shard, ...]:
        """Each sequence as a piece by itself."""
        return tuple(
            Shard(batch.index, batch.sequence_ids[[row]], batch.token_counts[[row]])
            for batch in self.micro_batches
            for row in self.places_in(batch.sequence_ids)
        )


def draw(catalogue: Catalogue, share: float, seed: int) -> Sample:
    """Draw `share` (above 0, at most 1) of the committed sequences, at least one. 12 bytes of memory a sequence of the run.

    Raises:
        NotInRunError: nothing is committed yet.
        RunDamagedError: a commit's micro-batches are not those of its shard, or a file cannot be understood.
        StoreError: it cannot be read.
    """
    store, job = catalogue.store, catalogue.job
    shards = load_shards(store, job.sequence_files)
    committed = [shards[number] for number in catalogue.committed]
    bounds = [0, *accumulate(len(shard.sequence_ids) for shard in committed)]
    if not bounds[-1]:
        raise NotInRunError(f"No sequence of the run at {store.url} is committed yet.", "Audit it once some are.")
    places = np.sort(np.random.default_rng(seed).choice(bounds[-1], max(1, round(share * bounds[-1])), replace=False))
    touched = [
        (shard, shard.sequence_ids[places[first:last] - start])
        for shard, start, first, last in zip(committed, bounds, *_between(places, bounds), strict=False)
        if first < last
    ]
    pieces: list[Shard] = []
    computed_on = set()
    for (shard, chosen), commit in zip(touched, read_commits(store, job, [shard.index for shard, _ in touched]), strict=True):
        cuts = list(accumulate((size for size, _ in commit.micro_batches), initial=0))
        if cuts[-1] != len(shard.sequence_ids):
            what = f"The commit of shard {shard.index} of {store.url} has micro-batches of {cuts[-1]} sequences; the shard has {len(shard.sequence_ids)}."
            raise RunDamagedError(what, "Restore the run.")
        batches = (Shard(shard.index, shard.sequence_ids[a:b], shard.token_counts[a:b]) for a, b in pairwise(cuts))
        pieces += [batch for batch in batches if np.isin(batch.sequence_ids, chosen).any()]
        computed_on.add(commit.computed_on)
    ids = np.sort(np.concatenate([chosen for _, chosen in touched]))
    return Sample(ids, bounds[-1], tuple(pieces), frozenset(computed_on))


def _between(places: Int64Array, bounds: list[int]) -> tuple[list[int], list[int]]:
    """Where in ascending `places` those between each two bounds begin and end."""
    cuts = np.searchsorted(places, bounds).tolist()
    return cuts[:-1], cuts[1:]


def least_share_found(num_drawn: int, num_all: int) -> float:
    """The smallest share of wrong sequences among `num_all` of which `num_drawn`, drawn without putting back, hold one with 95 %.

    If all are drawn, that is one of them.
    """

    def log_missed(num_wrong: int) -> float:
        """Of the chance that none of the wrong ones is drawn."""
        right = num_all - num_wrong
        if right < num_drawn:
            return float("-inf")
        return lgamma(right + 1) - lgamma(right - num_drawn + 1) - lgamma(num_all + 1) + lgamma(num_all - num_drawn + 1)

    low, high = 0, num_all  # none wrong is always missed, all wrong never
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exp(log_missed(middle)) <= 1 - _CONFIDENCE else (middle, high)
    return high / num_all
