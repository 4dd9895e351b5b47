"""Arrivals: the shards of a run that is still being extracted, in groups as they come, each shard once."""

import time
from collections.abc import Callable

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.open_parts import OpenParts
from m2ray.activations.schema import LEASE_FOLDER
from m2ray.errors import NotInRunError

_LOOK_S = 1.0
"""How often a run is looked at, at most: a look lists `_commits/`."""


class Arrivals:
    """Which shards came when, as one consumer saw it.

    Args:
        catalogue: of the run.
        parts: of the layer; it grows as shards come.
        groups: the shards of each group. Those that are there already, of a state, come first, in their order; new ones are added.
        idle_s: how long the run may give no sign of life while it is waited for.
    """

    def __init__(self, catalogue: Catalogue, parts: OpenParts, groups: list[list[int]], idle_s: float) -> None:
        self._catalogue = catalogue
        self._parts = parts
        self._groups = groups
        self._replayed = 0
        self._taken: set[int] = set()
        self._part_of: dict[int, int] = {}
        self._idle_s = idle_s
        self._looked_at = float("-inf")
        self._sign: object = None
        self._sign_at = time.monotonic()
        self._learn()

    def more(self, *, wait: bool) -> list[int] | None:
        """The part numbers of the next group: all shards that came since the last one. None if there is none yet; with `wait` at the end alone.

        Raises:
            NotInRunError: the run gave no sign of life for `idle_s` while it was waited for: no commit came, and no driver renewed its lease.
            RunDamagedError, StoreError: the run cannot be read.
        """
        if self._replayed == len(self._groups):
            if not self._come(lambda: len(self._part_of) > len(self._taken), wait=wait):
                return None
            self._groups.append(sorted(self._part_of.keys() - self._taken))
        group = self._groups[self._replayed]
        # Of a state's group a shard may be under repair.
        if not self._come(lambda: self._part_of.keys() >= set(group), wait=wait):
            return None
        self._replayed += 1
        self._taken.update(group)
        return [self._part_of[shard] for shard in group]

    def _come(self, is_there: Callable[[], bool], *, wait: bool) -> bool:
        """Whether it is there, after a look if it is time for one, or with `wait` after as many as it takes. False at the end of the run."""
        begin = time.monotonic()
        while not is_there():
            if len(self._part_of) == self._catalogue.job.num_shards:
                return False
            rest_s = self._looked_at + _LOOK_S - time.monotonic()
            if not wait:
                if rest_s <= 0:
                    self._look()
                return is_there()
            self._require_life(begin)
            time.sleep(max(0.0, rest_s))
            self._look()
        return True

    def _look(self) -> None:
        self._parts.look()
        self._learn()
        self._looked_at = time.monotonic()
        sign = len(self._part_of), self._lease()
        if sign != self._sign:
            self._sign, self._sign_at = sign, self._looked_at

    def _learn(self) -> None:
        self._part_of = {shard: part for part, shard in enumerate(self._parts.shards.tolist())}

    def _lease(self) -> frozenset[str]:
        """A driver at work creates another number every few seconds (writing/lease.py), so it is enough to see that they change."""
        return frozenset(key for key, _ in self._catalogue.store.list(LEASE_FOLDER))

    def _require_life(self, begin: float) -> None:
        if time.monotonic() - max(begin, self._sign_at) < self._idle_s:
            return
        driver = "its driver gives no sign any more" if self._lease() else "no driver is at it"
        raise NotInRunError(
            f"Nothing came of the run at {self._catalogue.store.url} for {self._idle_s:g} s, and {driver}: {len(self._part_of)} of "
            f"{self._catalogue.job.num_shards} shards are committed.",
            "Run its extract command again, and go on with the stream's state_dict(); idle_s says how long to wait for that.",
        )
