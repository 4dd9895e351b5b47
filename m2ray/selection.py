"""Which tokens become rows. Survey, capture, writer and readers ask here, so that they cannot disagree."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.batches import TOKEN_ROW, Int32Array, Int64Array, MicroBatch
from m2ray.option_text import TokenChoice, parse_tokens

Mask = npt.NDArray[np.bool_]

NO_TOKEN = -1
"""Position and token_id of a row that is the mean of several tokens."""


@dataclass(frozen=True)
class Selection:
    """One choice of tokens for all sites of a run.

    A token can be chosen if it is real, none of `skip_ids`, and, where the choice goes by a mask, in its sequence's loss mask. Of these it is
    all of a sequence, the last or first k, or those at every n-th position from 0 on; a mean is of all of them.

    Attributes:
        tokens: as m2ray.option_text.parse_tokens has it.
        skip_ids: token ids that are never chosen.
    """

    tokens: str = "all"
    skip_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        skipped = f" without the special ids {', '.join(map(str, self.skip_ids))}" if self.skip_ids else ""
        return f"the tokens {self.tokens!r}{skipped}"

    @property
    def is_all(self) -> bool:
        """Whether every token of every sequence has a row."""
        return self.tokens == "all" and not self.skip_ids

    @property
    def is_mean(self) -> bool:
        """Whether a row is the mean of a sequence's chosen tokens."""
        return self._choice.kind == "mean"

    @property
    def needs_mask(self) -> bool:
        """Whether it cannot be told without loss masks."""
        return self._choice.in_mask

    def places(self, micro_batch: MicroBatch) -> Int64Array:
        """Where a micro-batch's chosen tokens are among its B * T places, row by row: int64 [N], ascending."""
        return np.flatnonzero(self._of(micro_batch)).astype(np.int64, copy=False)

    def chosen_counts(self, micro_batch: MicroBatch) -> Int64Array:
        """How many of them each sequence has that has any: int64 [at most B], in their order."""
        counts: Int64Array = self._of(micro_batch).sum(axis=1, dtype=np.int64)
        return counts[counts > 0]

    def token_rows(self, micro_batch: MicroBatch) -> npt.NDArray[Any]:
        """The identities of a micro-batch's rows, as TOKEN_ROW: sequence by sequence, position by position. A mean has NO_TOKEN for both."""
        is_chosen_BT = self._of(micro_batch)
        if self.is_mean:
            ids = micro_batch.sequence_ids[is_chosen_BT.any(axis=1)]
            rows = np.full(len(ids), NO_TOKEN, TOKEN_ROW)
            rows["sequence_id"] = ids
            return rows
        rows = np.empty(int(is_chosen_BT.sum()), TOKEN_ROW)
        sequences_N, rows["position"] = np.nonzero(is_chosen_BT)
        rows["sequence_id"] = micro_batch.sequence_ids[sequences_N]
        rows["token_id"] = micro_batch.token_ids_BT[is_chosen_BT]
        return rows

    def row_count(self, token_ids: Int32Array, loss_mask: bytes | None) -> int:
        """Rows of one sequence in every part: of its token ids, int32 [T], and its loss mask, one byte 0 or 1 a token."""
        choice, num_tokens = self._choice, len(token_ids)
        if not self.skip_ids and not choice.in_mask:  # most runs: a million sequences are counted one by one
            found = {"all": num_tokens, "mean": 1, "every": -(-num_tokens // max(1, choice.number))}
            return found.get(choice.kind, min(num_tokens, choice.number))
        mask_1T = None if loss_mask is None else np.frombuffer(loss_mask, np.bool_)[None]
        num_chosen = int(self._chosen(np.array([num_tokens]), token_ids[None], mask_1T).sum())
        return min(1, num_chosen) if self.is_mean else num_chosen

    @cached_property
    def _choice(self) -> TokenChoice:
        return parse_tokens(self.tokens)

    def _of(self, micro_batch: MicroBatch) -> Mask:
        """Whether each token is chosen: bool [B, T]."""
        return self._chosen(micro_batch.token_counts, micro_batch.token_ids_BT, micro_batch.mask_BT)

    def _chosen(self, token_counts: npt.NDArray[Any], token_ids_BT: Int32Array, mask_BT: Mask | None) -> Mask:
        choice, positions_T = self._choice, np.arange(token_ids_BT.shape[1])
        may_be_BT: Mask = positions_T < token_counts[:, None]
        if self.skip_ids:
            may_be_BT &= ~np.isin(token_ids_BT, self.skip_ids)
        if choice.in_mask:
            assert mask_BT is not None, f"tokens = {self.tokens!r} needs a mask"
            may_be_BT &= mask_BT
        if choice.kind == "every":
            may_be_BT &= positions_T % choice.number == 0
        elif choice.kind == "first":
            may_be_BT &= np.cumsum(may_be_BT, axis=1) <= choice.number
        elif choice.kind == "last":
            may_be_BT &= np.cumsum(may_be_BT[:, ::-1], axis=1)[:, ::-1] <= choice.number
        return may_be_BT
