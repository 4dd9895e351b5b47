"""Order: which micro-batch of a shard may come next at each of its sites and layers."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from m2ray.batches import MicroBatch
from m2ray.errors import StageError
from m2ray.statistics import Place

_DEFECT = "This is a defect of m2ray."


class Order:
    """One attempt's micro-batches as they come at `places`: at each one after the other. A wave gives a micro-batch in pieces, some places each.

    Attributes:
        digest: xxh3-128 over the token rows of the micro-batches that have come anywhere.
        rows: theirs.
    """

    def __init__(self, label: str, places: Iterable[Place]) -> None:
        self.digest = xxhash.xxh3_128()
        self.rows = 0
        self._label = label
        self._next = dict.fromkeys(places, 0)
        self._begun = 0
        self._all: int | None = None
        self._last_sequence_id = -1

    @property
    def is_complete(self) -> bool:
        """Whether the last micro-batch has come at every place."""
        return self._all is not None and all(index == self._all for index in self._next.values())

    def admit(self, micro_batch: MicroBatch, places: Collection[Place], token_rows: npt.NDArray[Any]) -> None:
        """Take a micro-batch at some places. Raises StageError where it is not its turn, or rows would not ascend.

        Args:
            token_rows: TOKEN_ROW [N], of its chosen tokens.
        """
        awaited = {self._next[place] for place in places} | ({self._begun} if micro_batch.index >= self._begun else set())
        for index in sorted(awaited):
            if index == self._all or index != micro_batch.index:
                expected = "nothing more" if index == self._all else index
                raise StageError(f"{self._label}: micro-batch {micro_batch.index} came, expected was {expected}.", _DEFECT)
        if micro_batch.index == self._begun:
            self._begin(micro_batch, token_rows)
        for place in places:
            self._next[place] += 1

    def _begin(self, micro_batch: MicroBatch, token_rows: npt.NDArray[Any]) -> None:
        sequence_ids = np.concatenate([[self._last_sequence_id], micro_batch.sequence_ids])
        if (np.diff(sequence_ids) <= 0).any() or (micro_batch.token_counts <= 0).any():
            raise StageError(f"{self._label}: the sequences of micro-batch {micro_batch.index} do not ascend, or one is empty.", _DEFECT)
        self.digest.update(token_rows.view(np.uint8).data)
        self.rows += len(token_rows)
        self._last_sequence_id = int(sequence_ids[-1])
        self._begun += 1
        self._all = self._begun if micro_batch.is_last else None
