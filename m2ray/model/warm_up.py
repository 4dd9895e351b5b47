"""What a stage does before the first real micro-batch: it runs some of every shape that may come, and takes memory for rows."""

from collections.abc import Sequence

import numpy as np

from m2ray.batches import MicroBatch, PartSpec
from m2ray.model.attention import FLEX_BLOCK

_CRC_BYTES = 4


def shapes_that_may_come(batch_tokens: int, max_length: int, attn_implementation: str) -> list[tuple[int, int]]:
    """(sequences, tokens of each), the largest first.

    torch.compile makes a first graph for one shape and, on seeing a second one, a graph for all others; a batch of one is a
    shape of its own, and so are for flex_attention sequences within one block of its mask.

    Args:
        batch_tokens: padded tokens of a full micro-batch.
        max_length: of a sequence, where nobody asked for another.
    """
    longest = max(4, min(1024, max_length, batch_tokens // 2))
    full = -(-batch_tokens // longest)
    shapes = [(full, batch_tokens // full), (batch_tokens // (longest // 2), longest // 2), (1, longest)]
    if attn_implementation == "flex_attention":
        short = min(longest, FLEX_BLOCK // 2)
        shapes += [(max(2, batch_tokens // short), short), (1, short)]
    return shapes


def zeros(num_sequences: int, length: int) -> MicroBatch:
    """A micro-batch of nothing but the first token."""
    counts = np.full(num_sequences, length, np.int32)
    shape = (num_sequences, length)
    return MicroBatch(0, 0, True, np.arange(num_sequences), counts, np.zeros(shape, np.int32), np.ones(shape, np.bool_))


def rows_of_a_job(
    parts: Sequence[PartSpec], of_runs: Sequence[Sequence[PartSpec]], batch_tokens: int, waiting_bytes: int
) -> tuple[int, list[int]]:
    """What rows of all tokens take of the host's memory, as `PinnedRuns.reserve` takes it: bytes in all, and those of a row of each column, their CRCs among them.

    Args:
        parts: what is captured.
        of_runs: those of each run of layers, which leave the GPU together.
        batch_tokens: padded tokens of a full micro-batch.
        waiting_bytes: of rows that may wait for the store.
    """
    capture_bytes = batch_tokens * max(sum(part.row_bytes for part in of_run) for of_run in of_runs)
    columns = [num_bytes for part in parts for column in part.columns for num_bytes in (column.row_bytes, _CRC_BYTES)]
    # Beside what waits, of two micro-batches: one that is computed, and one whose rows are handed over.
    return (waiting_bytes + 2 * capture_bytes if parts else 0), columns
