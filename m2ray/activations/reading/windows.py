"""Windows: one consumer's blocks of one epoch, some at a time in memory, shuffled there, and cut into batches without a copy.

A window is half of the shuffle buffer. Its rows are each read straight to their place; what fills no batch moves in front of the next
window, which is read meanwhile.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from m2ray.activations.reading.open_parts import OpenParts
from m2ray.activations.reading.values import by_column, tensors_of
from m2ray.activations.reading.window_memory import WindowMemory
from m2ray.batches import Bits, Int64Array

_BLOCK_BYTES = 4 << 20
_BLOCKS_A_WINDOW = 8
READS_AT_ONCE = min(4, 1 + len(os.sched_getaffinity(0)))
"""From a page cache a read is a copy, and more of them than cores keep each other from Python's lock."""
REMOTE_READS_AT_ONCE = 16
"""From a server a read is mostly waiting."""

Batch = dict[str, torch.Tensor]
"""`activations` [N, W] in the store dtype (of router_topk `expert_ids` and `expert_weights` [N, K]), `sequence_id` int64 [N], `position` int32
[N], `token_id` int32 [N], and if the run has loss masks `loss_mask` uint8 [N]: 1 where the loss counts the token, or where its sequence has
no mask."""

Blocks = Int64Array
"""Runs of neighbours: part, start and stop of each, int64 [blocks, 3]."""

MoreBlocks = Callable[[bool], Blocks | None]
"""Gives the next blocks of an epoch, or None if there are none yet; asked to wait (True), at the end alone."""


@dataclass(frozen=True)
class WindowSizes:
    """How many rows: of a block, and of a window, at most."""

    block_rows: int
    window_rows: int

    @classmethod
    def of(cls, shuffle_buffer_bytes: int, bytes_of_row: int) -> "WindowSizes":
        window_rows = max(1, shuffle_buffer_bytes // 2 // bytes_of_row)
        block_rows = max(1, min(_BLOCK_BYTES // bytes_of_row, window_rows // _BLOCKS_A_WINDOW))
        return cls(block_rows, max(1, window_rows // block_rows) * block_rows)


class Windows:
    """The windows of an epoch, in their order.

    Args:
        parts: what blocks are of.
        memory: where windows lie.
        sizes: of blocks and windows.
        most_rows: that can be in a window at all.
        more: the blocks, in their order.
        seeds: the order of a window's rows follows from them and its number.
        is_remote: whether each read is a request to a server.
    """

    def __init__(
        self,
        parts: OpenParts,
        memory: WindowMemory,
        sizes: WindowSizes,
        most_rows: int,
        more: MoreBlocks,
        seeds: list[int],
        *,
        is_remote: bool,
    ) -> None:
        self._parts = parts
        self._memory = memory
        self._blocks_a_window = sizes.window_rows // sizes.block_rows
        self._memory_rows = min(sizes.window_rows, most_rows)
        self._more = more
        self._seeds = seeds
        self._reads_at_once = REMOTE_READS_AT_ONCE if is_remote else READS_AT_ONCE
        self._columns = parts.spec.columns
        self._windows: list[Blocks] = []
        self._sizes: list[int] = []
        self._places_ahead: tuple[int, Future[Int64Array]] | None = None

    def batches(self, batch_rows: int, skip_rows: int) -> Iterator[Batch]:
        """All batches but the first `skip_rows` rows. While a window is given out, the next one is read."""
        number = 0
        while skip_rows and self._is_there(number, wait=True) and skip_rows >= self._sizes[number]:
            skip_rows -= self._sizes[number]
            number += 1
        pool = ThreadPoolExecutor(self._reads_at_once, thread_name_prefix="stream")
        is_exiting = sys.is_finalizing  # held here: a stream that is open at the interpreter's end is closed when modules are empty
        try:
            carried = 0
            ahead = self._begin(pool, number, carried, batch_rows, wait=True)
            while ahead is not None:
                window, ahead = ahead.whole(), None
                stop = carried + self._sizes[number]
                carried = (stop - skip_rows) % batch_rows
                for start in range(skip_rows, stop - carried, batch_rows):
                    batch = self._batch(window, start, start + batch_rows)
                    yield batch
                    del batch
                    # Only now has whoever takes the batches let go of the last window, whose memory the next one takes.
                    ahead = ahead or self._begin(pool, number + 1, carried, batch_rows, wait=False)
                ahead = ahead or self._begin(pool, number + 1, carried, batch_rows, wait=True)
                if ahead is not None:
                    ahead.bits[:carried], ahead.tokens[:carried] = window.bits[stop - carried :], window.tokens[stop - carried :]
                elif carried:
                    yield self._batch(window, stop - carried, stop)
                del window
                number, skip_rows = number + 1, 0
        finally:
            if not is_exiting():
                pool.shutdown(cancel_futures=True)

    def _is_there(self, number: int, *, wait: bool) -> bool:
        """Whether the epoch has this window, as far as it is known."""
        while number >= len(self._windows):
            blocks = self._more(wait)
            if blocks is None:
                return False
            windows = [blocks[start : start + self._blocks_a_window] for start in range(0, len(blocks), self._blocks_a_window)]
            self._windows += windows
            self._sizes += [int((window[:, 2] - window[:, 1]).sum()) for window in windows]
        return True

    def _batch(self, window: "_Window", start: int, stop: int) -> Batch:
        """Its rows from `start` to `stop`. The values of a single column stay where they are."""
        values = tensors_of(self._columns, torch.from_numpy(window.bits[start:stop]))
        tokens = {name: torch.from_numpy(window.tokens[name][start:stop].copy()) for name in window.tokens.dtype.names or ()}
        return {**by_column(values), **tokens}

    def _begin(self, pool: ThreadPoolExecutor, number: int, carried: int, batch_rows: int, *, wait: bool) -> "_Window | None":
        """Begin to read a window, behind room for the `carried` rows of the one before that fill no batch."""
        if not self._is_there(number, wait=wait):
            return None
        blocks = self._windows[number]
        edges = np.concatenate([[0], np.cumsum(blocks[:, 2] - blocks[:, 1])])
        is_known = self._places_ahead is not None and self._places_ahead[0] == number
        places = carried + (self._places_ahead[1].result() if self._places_ahead and is_known else self._places(number))
        bits = self._memory.take(self._memory_rows + batch_rows - 1)[: carried + len(places)]
        tokens = np.empty(len(bits), self._parts.token_dtype)

        def read(block: int) -> None:
            part, start, stop = blocks[block].tolist()
            into = places[edges[block] : edges[block + 1]]
            pages, tokens_of_part = self._parts(part)
            pages.take(np.arange(start, stop), bits, into)
            tokens[into] = tokens_of_part[start:stop]

        window = _Window(bits, tokens, [pool.submit(read, block) for block in range(len(blocks))])
        if number + 1 < len(self._windows):
            self._places_ahead = number + 1, pool.submit(self._places, number + 1)
        return window

    def _places(self, number: int) -> Int64Array:
        """Where each of a window's rows goes: int64 [N]."""
        return np.random.default_rng([*self._seeds, number]).permutation(self._sizes[number])


@dataclass(frozen=True)
class _Window:
    """A window's rows and tokens in memory, and the reads that put them there."""

    bits: Bits
    tokens: npt.NDArray[Any]
    reads: list[Future[None]]

    def whole(self) -> "_Window":
        """Wait for all of it. Raises what a read raised."""
        for read in self.reads:
            read.result()
        return self


def in_random_order(rows_of_parts: Int64Array, block_rows: int, parts_at_once: int, rng: np.random.Generator) -> Blocks:
    """Every block of parts 0 and on. Parts come in groups, so that each is opened once."""
    order = rng.permutation(len(rows_of_parts)).tolist()
    groups = [np.empty((0, 3), np.int64)]
    for first in range(0, len(order), parts_at_once):
        blocks = [
            (part, start, min(start + block_rows, int(rows_of_parts[part])))
            for part in order[first : first + parts_at_once]
            for start in range(0, int(rows_of_parts[part]), block_rows)
        ]
        groups.append(rng.permutation(np.array(blocks, np.int64).reshape(-1, 3)))
    return np.concatenate(groups)
