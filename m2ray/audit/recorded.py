"""What the run holds of the audited sequences: their tokens and rows, read as any reader reads them."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.batches import PartReceipt, PartSpec, Shard

_KEPT_TOKENS = 1 << 22


class RecordedRows:
    """The rows of a run by shard, layer and sequence. Every page and token is held against its digest.

    Memory holds one shard's tokens, and those of the sequences asked for last, 64 MiB of them.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._shard: tuple[int, npt.NDArray[Any]] | None = None
        self._kept: dict[int, tuple[int, npt.NDArray[Any]]] = {}
        self._num_kept = 0

    def tokens(self, shard: int, sequence_id: int) -> npt.NDArray[Any]:
        """Which rows there are of a sequence: TOKEN_ROW [N], ascending by position. Raises RunDamagedError or StoreError."""
        return self._found(shard, sequence_id)[1]

    def rows(self, spec: PartSpec, shard: int, sequence_ids: list[int]) -> torch.Tensor:
        """The rows of some sequences of a shard, one behind the other: uint8 [N, bytes of a row]. Raises RunDamagedError or StoreError."""
        pages = self._catalogue.open_part(spec, self._receipt(spec, shard)).pages()
        places = [self._found(shard, sequence_id) for sequence_id in sequence_ids]
        rows, filled = np.empty((sum(len(tokens) for _, tokens in places), spec.row_bytes), np.uint8), 0
        for start, tokens in places:
            pages.read(start, rows[filled : filled + len(tokens)])
            filled += len(tokens)
        return torch.from_numpy(rows)

    def holds_all(self, piece: Shard) -> bool:
        """Whether the run has a row of every token of these sequences."""
        counts = [len(self.tokens(piece.index, number)) for number in piece.sequence_ids.tolist()]
        return bool(np.array_equal(counts, piece.token_counts))

    def _found(self, shard: int, sequence_id: int) -> tuple[int, npt.NDArray[Any]]:
        """The number of a sequence's first row in each part of the shard, and its tokens."""
        if sequence_id not in self._kept:
            if self._shard is None or self._shard[0] != shard:
                spec = self._catalogue.job.parts[0]
                self._shard = (shard, self._catalogue.open_part(spec, self._receipt(spec, shard)).tokens())
            start, stop = np.searchsorted(self._shard[1]["sequence_id"], [sequence_id, sequence_id + 1]).tolist()
            if self._num_kept > _KEPT_TOKENS:
                self._kept.clear()
                self._num_kept = 0
            self._kept[sequence_id] = (start, self._shard[1][start:stop].copy())
            self._num_kept += stop - start
        return self._kept[sequence_id]

    def _receipt(self, spec: PartSpec, shard: int) -> PartReceipt:
        receipt = self._catalogue.part_of_shard(spec, shard)
        assert receipt is not None, "drawn from what is committed"
        return receipt
