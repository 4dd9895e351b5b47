"""Shards of sequences of like length, and the micro-batches they go through a stage in."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from m2ray.batches import MOST_SEQUENCES, Int32Array, Int64Array, MicroBatch, PromptStats, Shard

WINDOW_ROWS = 1 << 16
"""Source rows that are sorted by length together. Larger windows pad less and delay the first shard more."""

_LIKE_LENGTH = 0.8
_JUDGED_SHARDS = 64
_LEAST_SHARD_SHARE = 1 / 16
# On an H200 2,048 tokens of one MiniMax-M2 layer take 4.7 ms and 16,384 take 22.8: a tenth of a full micro-batch's time is fixed.
_FIXED_COST_SHARE = 0.1


ShardCounts = tuple[Int64Array, Int32Array, Int32Array]
"""A shard's sequence ids, their token counts and their row counts."""


class ShardTable(Sequence[Shard]):
    """All shards of a run by their number, 12 to 16 bytes a sequence: flat arrays, cut at `bounds` (int64 [shards + 1])."""

    def __init__(self, sequence_ids: Int64Array, token_counts: Int32Array, row_counts: Int32Array, bounds: Int64Array) -> None:
        self._sequence_ids = sequence_ids
        self._token_counts = token_counts
        self._row_counts = token_counts if np.array_equal(row_counts, token_counts) else row_counts
        self._bounds = bounds

    @classmethod
    def join(cls, pieces: Sequence[ShardCounts]) -> "ShardTable":
        """From each shard's arrays, in order."""
        bounds = np.cumsum([0, *(len(ids) for ids, _, _ in pieces)], dtype=np.int64)
        ids, tokens, rows = zip(*pieces, strict=True) if pieces else ((), (), ())
        none = np.empty(0, np.int32)
        return cls(np.concatenate([np.empty(0, np.int64), *ids]), np.concatenate([none, *tokens]), np.concatenate([none, *rows]), bounds)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, stop = self._bounds[number], self._bounds[number + 1]
        return Shard(number, self._sequence_ids[start:stop], self._token_counts[start:stop], self._row_counts[start:stop])

    @property
    def num_sequences(self) -> int:
        return len(self._sequence_ids)

    @property
    def num_tokens(self) -> int:
        return int(self._token_counts.sum(dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Rows in each part of all shards together."""
        return int(self._row_counts.sum(dtype=np.int64))

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence; 0 without any."""
        return int(self._token_counts.max(initial=0))


def cut_shards(token_counts: Int32Array, shard_tokens: int) -> list[npt.NDArray[np.intp]]:
    """Cut one window's sequences into shards, the longest first, so that lack of memory shows early.

    A shard holds at most MOST_SEQUENCES sequences and `shard_tokens` tokens, counted as if padded to its longest sequence; a longer
    sequence stands alone. A shard of several sequences has an even number of them, so that it makes two full micro-batches of half its
    tokens (the defaults) instead of two and a rest. It ends early, once a sixteenth full, rather than mix unlike lengths.

    Args:
        token_counts: int32 [S], each above 0.
        shard_tokens: tokens in a shard, at most.

    Returns:
        For each shard, ascending places in `token_counts`.
    """
    order = np.argsort(-token_counts, kind="stable")
    falling = token_counts[order].astype(np.int64)
    tokens_before = np.concatenate([[0], np.cumsum(falling)])
    shards: list[npt.NDArray[np.intp]] = []
    start = 0
    while start < len(order):
        longest = int(falling[start])
        room = min(max(1, shard_tokens // longest), MOST_SEQUENCES)
        num_alike = int(np.searchsorted(-falling[start : start + room], -_LIKE_LENGTH * longest, side="right"))
        num_least = int(np.searchsorted(tokens_before[start + 1 :], tokens_before[start] + _LEAST_SHARD_SHARE * shard_tokens)) + 1
        size = min(room, max(num_alike, num_least))
        size -= size % 2 if size > 1 else 0
        shards.append(np.sort(order[start : start + size]))
        start += size
    return shards


def cut_micro_batches(token_counts: Int32Array, batch_tokens: int) -> list[int]:
    """Cut a shard's sequences, in their order, into runs: the bounds of the cheapest cut, from 0 to S.

    Each run holds at most `batch_tokens` padded tokens; a single longer sequence stands alone and exceeds that. A run
    costs its padded tokens and a fixed tenth of `batch_tokens`, so padding is saved only where it outweighs another
    micro-batch. Exact, by dynamic programming over the run that ends at each sequence.
    """
    fixed_cost = _FIXED_COST_SHARE * batch_tokens
    num_sequences = len(token_counts)
    falling_counts = token_counts[::-1].astype(np.int64)
    costs = np.zeros(num_sequences + 1)
    starts = [0] * (num_sequences + 1)
    first = 0  # where the longest run that may end here begins; it never moves back
    for stop in range(1, num_sequences + 1):
        longest = np.maximum.accumulate(falling_counts[num_sequences - stop : num_sequences - first])
        padded = longest * np.arange(1, len(longest) + 1)
        num_runs = max(1, int(np.searchsorted(padded, batch_tokens, side="right")))
        first = stop - num_runs
        run_costs = costs[first:stop][::-1] + padded[:num_runs] + fixed_cost
        shortest = int(run_costs.argmin())
        costs[stop] = run_costs[shortest]
        starts[stop] = stop - 1 - shortest
    bounds = [num_sequences]
    while bounds[-1] > 0:
        bounds.append(starts[bounds[-1]])
    return bounds[::-1]


class Tokens(Protocol):
    """Token ids by sequence, and loss masks: a survey's spool, or the few prompts of a request."""

    @property
    def keeps_masks(self) -> bool:
        """Whether there are loss masks."""

    def read(self, sequence_id: int) -> Int32Array:
        """A sequence's token ids."""

    def mask(self, sequence_id: int) -> npt.NDArray[np.bool_]:
        """Its loss mask, where there are any."""


def micro_batches(shard: Shard, tokens: Tokens, batch_tokens: int) -> Iterator[MicroBatch]:
    """The shard's sequences in their order, right-padded with 0, at most `batch_tokens` padded tokens a micro-batch.

    A single sequence longer than `batch_tokens` makes a micro-batch of its own, without padding.
    """
    runs = list(pairwise(cut_micro_batches(shard.token_counts, batch_tokens)))
    for index, (start, stop) in enumerate(runs):
        piece = Shard(shard.index, shard.sequence_ids[start:stop], shard.token_counts[start:stop])
        yield one_micro_batch(piece, tokens, index, is_last=index == len(runs) - 1)


def one_micro_batch(piece: Shard, tokens: Tokens, index: int = 0, *, is_last: bool = True) -> MicroBatch:
    """A piece of a shard as one micro-batch, right-padded with 0; with its loss masks if the spool keeps them."""
    token_ids_BT = np.zeros((len(piece.sequence_ids), int(piece.token_counts.max())), np.int32)
    mask_BT = np.zeros(token_ids_BT.shape, np.bool_) if tokens.keeps_masks else None
    for row, (sequence_id, count) in enumerate(zip(piece.sequence_ids.tolist(), piece.token_counts.tolist(), strict=True)):
        token_ids_BT[row, :count] = tokens.read(sequence_id)
        if mask_BT is not None:
            mask_BT[row, :count] = tokens.mask(sequence_id)
    return MicroBatch(piece.index, index, is_last, piece.sequence_ids, piece.token_counts, token_ids_BT, mask_BT)


def batching(shards: Sequence[Shard], batch_tokens: int) -> PromptStats:
    """How these shards will be cut."""
    sequences = tokens = rows = padded_tokens = longest_tokens = num_batches = 0
    for shard in shards:
        sequences += len(shard.sequence_ids)
        tokens += shard.num_tokens
        rows += shard.num_rows
        for start, stop in pairwise(cut_micro_batches(shard.token_counts, batch_tokens)):
            padded_tokens += int(shard.token_counts[start:stop].max()) * (stop - start)
            num_batches += 1
        longest_tokens = max(longest_tokens, int(shard.token_counts.max()))
    return PromptStats(sequences, tokens, padded_tokens, longest_tokens, len(shards), num_batches, rows)


def estimated_batching(shards: Sequence[Shard], batch_tokens: int) -> PromptStats:
    """Nearly the same from some of the shards: of a large run, cutting all of them takes seconds."""
    step = max(1, len(shards) // _JUDGED_SHARDS)
    found = batching(shards[::step], batch_tokens)
    counted = {name: step * value for name, value in vars(found).items() if name != "longest_tokens"}
    return replace(found, **counted)
