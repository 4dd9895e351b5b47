"""ActivationStream: a layer's rows in random order, every one once an epoch, for training.

Rows lie in blocks, runs of neighbours in a part. An epoch is one order of all blocks, dealt out to the consumers (each worker of
each rank is one). A consumer takes its blocks by the window, half of the shuffle buffer, and shuffles the window's rows; the
next window is read meanwhile. All of it follows from seed, epoch and the run, so a position is one number: the rows given.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from m2ray.activations.catalogue import Catalogue
from m2ray.activations.manifest import receipts_of
from m2ray.activations.random_rows import RandomRows
from m2ray.activations.schema import row_bytes
from m2ray.batches import TOKEN_ROW, Int64Array, PartSpec
from m2ray.errors import ConfigError

_BLOCK_BYTES = 4 << 20
_BLOCKS_A_WINDOW = 8
_READS_AT_ONCE = 4
_TOKENS_KEPT_BYTES = 256 << 20

Batch = dict[str, torch.Tensor]
"""`activations` [N, W] in the store dtype, `sequence_id` int64 [N], `position` int32 [N] and `token_id` int32 [N]."""


@dataclass(frozen=True)
class StreamOptions:
    """What decides which rows come when. `shuffle_buffer_bytes` bounds the rows that a worker holds."""

    batch_rows: int
    shuffle_buffer_bytes: int
    seed: int
    rank: int
    world_size: int


class ActivationStream(IterableDataset[Batch]):
    """Batches of a one-layer view's rows. Give it to a DataLoader with `batch_size=None`, or iterate over it as it is.

    Every committed row comes once an epoch over all ranks and workers; ranks may differ by a few blocks of 4 MiB. All batches have
    `batch_rows` rows but a worker's last. Call `set_epoch` for another order. The tensors are the caller's own.

    Besides its buffer a worker keeps at most 256 MiB of token ids, and where the rows of its last 4,096 parts lie.

    Raises:
        ConfigError: an option makes no sense.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec, options: StreamOptions) -> None:
        _check(options)
        self._catalogue = catalogue
        self._spec = spec
        self._options = options
        self._parts = catalogue.parts_of(spec)
        self._fingerprint = xxhash.xxh3_128_hexdigest("\n".join(self._parts["key"].to_pylist()).encode())
        self._epoch = 0
        self._rows_given = 0
        self._resumed: Mapping[str, Any] | None = None

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
        if self._resumed is not None:
            _require_same(self._resumed, self._place())
        else:
            self._rows_given = 0
        self._resumed = None
        place = self._place()
        windows = _Windows(self._catalogue, self._spec, self._options, self._epoch, place["consumer"], place["consumers"])
        for batch in windows.batches(self._options.batch_rows, skip_rows=self._rows_given):
            self._rows_given += len(batch["activations"])
            yield batch

    def _place(self) -> dict[str, Any]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        options = self._options
        return {"parts": self._fingerprint, "consumer": options.rank * workers + number, "consumers": options.world_size * workers}


class _Windows:
    """One consumer's share of one epoch."""

    def __init__(self, catalogue: Catalogue, spec: PartSpec, options: StreamOptions, epoch: int, consumer: int, consumers: int) -> None:
        self._catalogue = catalogue
        self._spec = spec
        self._seeds = [options.seed, epoch, consumer]
        self._rows = RandomRows(catalogue, spec)
        self._buffers: list[torch.Tensor] = []
        self._parts = catalogue.parts_of(spec)
        window_rows = max(1, options.shuffle_buffer_bytes // 2 // row_bytes(spec))
        block_rows = max(1, min(_BLOCK_BYTES // row_bytes(spec), window_rows // _BLOCKS_A_WINDOW))
        blocks = _blocks(self._parts["rows"].to_numpy(), block_rows)
        order = np.random.default_rng([options.seed, epoch]).permutation(len(blocks))[consumer::consumers]
        a_window = max(1, window_rows // block_rows)
        self._windows = [blocks[order[start : start + a_window]] for start in range(0, len(order), a_window)]
        largest = max(self._parts["rows"].to_pylist(), default=1)
        self._tokens = lru_cache(max(1, _TOKENS_KEPT_BYTES // (largest * TOKEN_ROW.itemsize)))(self._read_tokens)

    def batches(self, batch_rows: int, skip_rows: int) -> Iterator[Batch]:
        """All batches but the first `skip_rows` rows. While a window is given out, the next one is read."""
        # Two windows of memory, used in turn: fresh memory for each would take longer than the reading.
        sizes = [int((window[:, 2] - window[:, 1]).sum()) for window in self._windows]
        number = 0
        while number < len(sizes) and skip_rows >= sizes[number]:
            skip_rows -= sizes[number]
            number += 1
        largest, dtype = max(sizes, default=0), getattr(torch, self._spec.dtype)
        self._buffers = [torch.empty((largest, self._spec.width), dtype=dtype) for _ in sizes[:2]]
        pool = ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="stream")
        try:
            ahead = self._begin(pool, number)
            rest: list[Batch] = []
            while ahead is not None:
                window, ahead, number = ahead.whole(), self._begin(pool, number + 1), number + 1
                missing_rows = batch_rows - sum(len(piece["activations"]) for piece in rest)
                for start, stop in _cuts(skip_rows, sizes[number - 1], missing_rows, batch_rows):
                    rest.append({name: column[start:stop] for name, column in window.items()})
                    if sum(len(piece["activations"]) for piece in rest) == batch_rows:
                        yield _joined(rest)
                        rest = []
                rest = [_joined(rest)] if rest else []  # a copy: the window can go
                skip_rows = 0
            if rest:
                yield rest[0]
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, number: int) -> "_Filling | None":
        if number >= len(self._windows):
            return None
        blocks = self._windows[number]
        edges = np.concatenate([[0], np.cumsum(blocks[:, 2] - blocks[:, 1])])
        places = np.random.default_rng([*self._seeds, number]).permutation(edges[-1])
        rows_NW = self._buffers[number % 2][: len(places)]
        bits, tokens = rows_NW.view(torch.uint8).numpy(), np.empty(len(places), TOKEN_ROW)

        def read(block: int) -> None:
            part, start, stop = blocks[block].tolist()
            into = places[edges[block] : edges[block + 1]]
            self._rows.pages(part).take(np.arange(start, stop), bits, into)
            tokens[into] = self._tokens(part)[start:stop]

        return _Filling(rows_NW, tokens, [pool.submit(read, block) for block in range(len(blocks))])

    def _read_tokens(self, part: int) -> npt.NDArray[Any]:
        (receipt,) = receipts_of(self._parts.slice(part, 1))
        return self._catalogue.open_part(self._spec, receipt).tokens()


@dataclass(frozen=True)
class _Filling:
    """A window on its way into memory."""

    rows_NW: torch.Tensor
    tokens: npt.NDArray[Any]
    reads: list[Future[None]]

    def whole(self) -> Batch:
        """Wait for all of it. Raises what a read raised."""
        for read in self.reads:
            read.result()
        names = TOKEN_ROW.names or ()
        return {"activations": self.rows_NW} | {name: torch.from_numpy(np.ascontiguousarray(self.tokens[name])) for name in names}


def _blocks(rows_of_parts: Int64Array, block_rows: int) -> Int64Array:
    """(part, start, stop) of every block: int64 [blocks, 3]."""
    return np.array(
        [
            (part, start, min(start + block_rows, rows))
            for part, rows in enumerate(rows_of_parts.tolist())
            for start in range(0, rows, block_rows)
        ],
        np.int64,
    ).reshape(-1, 3)


def _cuts(start: int, stop: int, first_rows: int, batch_rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into a first piece of `first_rows`, pieces of `batch_rows`, and what is left."""
    end = min(stop, start + first_rows)
    while start < stop:
        yield start, end
        start, end = end, min(stop, end + batch_rows)


def _joined(pieces: list[Batch]) -> Batch:
    """One batch of its own memory."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


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
            f"This state of a stream is of another one: {'; '.join(differing)}.", "Make the stream as it was, or begin an epoch anew."
        )
