"""Which tokens become rows. Capture, writer and commit ask here, so that they cannot disagree: every real token, so far."""

from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.batches import TOKEN_ROW, Int64Array, MicroBatch, Shard


def places(micro_batch: MicroBatch) -> Int64Array:
    """Where a micro-batch's chosen tokens are among its B * T places, row by row: int64 [N], ascending."""
    return np.flatnonzero(_is_real(micro_batch)).astype(np.int64, copy=False)


def token_rows(micro_batch: MicroBatch) -> npt.NDArray[Any]:
    """The identities of the rows at `places`, as TOKEN_ROW [N]: sequence by sequence, position by position."""
    is_real_BT = _is_real(micro_batch)
    rows = np.empty(int(is_real_BT.sum()), TOKEN_ROW)
    sequences_N, rows["position"] = np.nonzero(is_real_BT)
    rows["sequence_id"] = micro_batch.sequence_ids[sequences_N]
    rows["token_id"] = micro_batch.token_ids_BT[is_real_BT]
    return rows


def num_rows(shard: Shard) -> int:
    """Rows in each part of a shard."""
    return shard.num_tokens


def _is_real(micro_batch: MicroBatch) -> npt.NDArray[np.bool_]:
    """Not padding: bool [B, T]."""
    return np.arange(micro_batch.token_ids_BT.shape[1]) < micro_batch.token_counts[:, None]
