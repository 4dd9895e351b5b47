"""ActivationStream: a layer's rows in random order, every one once an epoch, for training.

Rows lie in blocks, runs of neighbours in a part. An epoch is one order of all blocks, dealt out to the consumers (each worker of
each rank is one). A consumer takes its blocks by the window, half of the shuffle buffer, and shuffles the window's rows: each is
read straight to its place, and batches are cut from the window without a copy; what fills no batch moves in front of the next window,
which is read meanwhile. All of it follows from seed, epoch and the run, so a position is one number: the rows given.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.open_parts import OpenParts
from m2ray.activations.reading.window_memory import WindowMemory
from m2ray.activations.schema import row_bytes
from m2ray.batches import TOKEN_ROW, Bits, Int64Array, PartSpec
from m2ray.errors import ConfigError

_BLOCK_BYTES = 4 << 20
_BLOCKS_A_WINDOW = 8
READS_AT_ONCE = min(4, 1 + len(os.sched_getaffinity(0)))
"""From a page cache a read is a copy, and more of them than cores keep each other from Python's lock."""

Batch = dict[str, torch.Tensor]
"""`activations` [N, W] in the store dtype, `sequence_id` int64 [N], `position` int32 [N] and `token_id` int32 [N]."""


@dataclass(frozen=True)
class StreamOptions:
    """What decides which rows come when. A worker holds at most `shuffle_buffer_bytes` and two batches of rows; half as much again if a
    batch is larger than half of the buffer.
    """

    batch_rows: int
    shuffle_buffer_bytes: int
    seed: int
    rank: int
    world_size: int


class ActivationStream(IterableDataset[Batch]):
    """Batches of a one-layer view's rows. Give it to a DataLoader with `batch_size=None`, or iterate over it as it is.

    Every committed row comes once an epoch over all ranks and workers; ranks may differ by a few blocks of 4 MiB. All batches have
    `batch_rows` rows but a worker's last. Call `set_epoch` for another order. The tensors are the caller's own. As long as one is kept,
    the memory of its window, half of the shuffle buffer, is not used again: clone what is kept for long.

    Besides its buffer, which it keeps from epoch to epoch, a worker keeps at most 256 MiB of token ids, and where their rows lie.

    Raises:
        ConfigError: an option makes no sense.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec, options: StreamOptions) -> None:
        _check(options)
        self._catalogue = catalogue
        self._spec = spec
        self._options = options
        self._fingerprint = xxhash.xxh3_128_hexdigest("\n".join(catalogue.parts_of(spec)["key"].to_pylist()).encode())
        self._epoch = 0
        self._rows_given = 0
        self._resumed: Mapping[str, Any] | None = None
        # Of the process that iterates alone: a forked worker must not wait for its parent's threads.
        self._held: tuple[int, OpenParts, WindowMemory] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first row."""
        self._epoch, self._rows_given, self._resumed = epoch, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as plain values: the batches given so far are behind it.

        With workers this is each worker's own state, which torchdata's StatefulDataLoader collects.
        """
        return {**asdict(self._options), **self._place(), "epoch": self._epoch, "rows_given": self._rows_given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken.

        Raises:
            ConfigError: it was taken of another run or layer, or with other options.
        """
        _require_same(state, {**asdict(self._options), "parts": self._fingerprint})
        self._epoch, self._rows_given, self._resumed = int(state["epoch"]), int(state["rows_given"]), dict(state)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the first on, or from where a loaded state stood.

        Raises:
            ConfigError: the loaded state was taken with another number of workers.
            RunDamagedError: a file is not what its commit says.
        """
        skip_rows = 0
        if self._resumed is not None:
            _require_same(self._resumed, self._place())
            skip_rows = self._rows_given
        self._rows_given, self._resumed = skip_rows, None
        if self._held is None or self._held[0] != os.getpid():
            self._held = (os.getpid(), OpenParts(self._catalogue, self._spec), WindowMemory(row_bytes(self._spec)))
        _, parts, memory = self._held
        place = self._place()
        windows = _Windows(parts, memory, self._spec, self._options, self._epoch, place["consumer"], place["consumers"])
        for batch in windows.batches(self._options.batch_rows, skip_rows):
            self._rows_given += len(batch["activations"])
            yield batch

    def _place(self) -> dict[str, Any]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        options = self._options
        return {"parts": self._fingerprint, "consumer": options.rank * workers + number, "consumers": options.world_size * workers}


class _Windows:
    """One consumer's share of one epoch."""

    def __init__(
        self, parts: OpenParts, memory: WindowMemory, spec: PartSpec, options: StreamOptions, epoch: int, consumer: int, consumers: int
    ) -> None:
        self._parts = parts
        self._memory = memory
        self._dtype = getattr(torch, spec.dtype)
        self._seeds = [options.seed, epoch, consumer]
        window_rows = max(1, options.shuffle_buffer_bytes // 2 // row_bytes(spec))
        block_rows = max(1, min(_BLOCK_BYTES // row_bytes(spec), window_rows // _BLOCKS_A_WINDOW))
        all_blocks = _in_random_order(parts.rows, block_rows, parts.kept // 2, np.random.default_rng([options.seed, epoch]))
        blocks = all_blocks[consumer::consumers]
        a_window = max(1, window_rows // block_rows)
        self._window_rows = min(a_window * block_rows, int(parts.rows.sum()))
        self._windows = [blocks[start : start + a_window] for start in range(0, len(blocks), a_window)]
        self._sizes = [int((window[:, 2] - window[:, 1]).sum()) for window in self._windows]
        self._next_places: Future[Int64Array] | None = None

    def batches(self, batch_rows: int, skip_rows: int) -> Iterator[Batch]:
        """All batches but the first `skip_rows` rows. While a window is given out, the next one is read."""
        sizes, number = self._sizes, 0
        while number < len(sizes) and skip_rows >= sizes[number]:
            skip_rows -= sizes[number]
            number += 1
        pool = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="stream")
        try:
            carried = 0
            ahead = self._begin(pool, number, carried, batch_rows)
            while ahead is not None:
                window, ahead = ahead.whole(), None
                stop = carried + sizes[number]
                carried = (stop - skip_rows) % batch_rows
                for start in range(skip_rows, stop - carried, batch_rows):
                    batch = self._batch(window, start, start + batch_rows)
                    yield batch
                    del batch
                    # Only now has whoever takes the batches let go of the last window, whose memory the next one takes.
                    ahead = ahead or self._begin(pool, number + 1, carried, batch_rows)
                ahead = ahead or self._begin(pool, number + 1, carried, batch_rows)
                if ahead is not None:
                    ahead.bits[:carried], ahead.tokens[:carried] = window.bits[stop - carried :], window.tokens[stop - carried :]
                elif carried:
                    yield self._batch(window, stop - carried, stop)
                del window
                number, skip_rows = number + 1, 0
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, window: "_Window", start: int, stop: int) -> Batch:
        """Its rows from `start` to `stop`. The activations stay where they are."""
        columns = {name: torch.from_numpy(window.tokens[name][start:stop].copy()) for name in TOKEN_ROW.names or ()}
        return {"activations": torch.from_numpy(window.bits[start:stop]).view(self._dtype), **columns}

    def _begin(self, pool: ThreadPoolExecutor, number: int, carried: int, batch_rows: int) -> "_Window | None":
        """Begin to read a window, behind room for the `carried` rows of the one before that fill no batch."""
        if number >= len(self._windows):
            return None
        blocks = self._windows[number]
        edges = np.concatenate([[0], np.cumsum(blocks[:, 2] - blocks[:, 1])])
        places = carried + (self._next_places.result() if self._next_places else self._places(number))
        bits = self._memory.take(self._window_rows + batch_rows - 1)[: carried + len(places)]
        tokens = np.empty(len(bits), TOKEN_ROW)

        def read(block: int) -> None:
            part, start, stop = blocks[block].tolist()
            into = places[edges[block] : edges[block + 1]]
            pages, tokens_of_part = self._parts(part)
            pages.take(np.arange(start, stop), bits, into)
            tokens[into] = tokens_of_part[start:stop]

        window = _Window(bits, tokens, [pool.submit(read, block) for block in range(len(blocks))])
        if number + 1 < len(self._windows):
            self._next_places = pool.submit(self._places, number + 1)
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


def _in_random_order(rows_of_parts: Int64Array, block_rows: int, parts_at_once: int, rng: np.random.Generator) -> Int64Array:
    """(part, start, stop) of every block: int64 [blocks, 3]. Parts come in groups, so that each is opened once."""
    order = rng.permutation(len(rows_of_parts)).tolist()
    groups = [np.empty((0, 3), np.int64)]
    for first in range(0, len(order), parts_at_once):
        blocks = [
            (part, start, min(start + block_rows, int(rows_of_parts[part])))
            for part in order[first : first + parts_at_once]
            for start in range(0, int(rows_of_parts[part]), block_rows)
        ]
        groups.append(rng.permutation(np.array(blocks, np.int64)))
    return np.concatenate(groups)


def _check(options: StreamOptions) -> None:
    if not 0 <= options.rank < options.world_size:
        raise ConfigError(f"rank = {options.rank} of world_size = {options.world_size}: ranks go from 0 to world_size - 1.")
    for name in ("batch_rows", "shuffle_buffer_bytes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)} is not at least 1.")
    if options.seed < 0:
        raise ConfigError(f"seed = {options.seed} is negative.")


def _require_same(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [f"{name} was {state.get(name, 'absent')}, is {value}" for name, value in now.items() if state.get(name) != value]
    if differing:
        raise ConfigError(
            f"This state of a stream is of another one: {'; '.join(differing)}.",
            "Make the stream as it was, or leave its state out and begin with an epoch's first row.",
        )
