"""ActivationStream: a layer's rows in random order, every one once an epoch, for training; of a run that is still being extracted, too.

Rows lie in blocks, runs of neighbours in a part. The blocks of each shard are dealt out to the consumers (each worker of each rank is
one). An epoch is one order of them, in which a consumer takes and shuffles its own by the window (windows.py). All of it follows from seed,
epoch and the run, so a position is one number: the rows given. Where a run is followed, the order is that of groups: the shards that came
since the last group. Which these were is the other half of the position then.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import IterableDataset

from m2ray.activations.reading.arrivals import Arrivals
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.open_parts import OpenParts
from m2ray.activations.reading.shares import consumer_of, require_positive, require_same, require_share
from m2ray.activations.reading.window_memory import WindowMemory
from m2ray.activations.reading.windows import Batch, Blocks, MoreBlocks, Windows, WindowSizes, in_random_order
from m2ray.batches import PartSpec


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
    follow: bool


class ActivationStream(IterableDataset[Batch]):
    """Batches of a one-layer view's rows. Give it to a DataLoader with `batch_size=None`, or iterate over it as it is.

    Every committed row comes once an epoch over all ranks and workers, if all have one `shuffle_buffer_bytes` and one number of workers, by which
    each reckons its share alone; ranks may differ by some blocks of 4 MiB. Ranks that opened an
    unfinished run at different times have no row in common, and leave out those of shards that the rank whose they are has not seen. All batches have
    `batch_rows` rows but a worker's last. Call `set_epoch` for another order. The tensors are the caller's own. As long as one is kept,
    the memory of its window, half of the shuffle buffer, is not used again: clone what is kept for long.

    With `follow` an epoch is all of the run, also what is committed while it lasts, and ends when every shard was given. What is there at the
    beginning is shuffled as ever. Then come groups: all shards that were committed while the ones before were given out, shuffled among
    themselves, by the window. So a trainer that is faster than the extraction waits, and sees rows mixed within single shards; a slower one
    sees them mixed as well as without `follow`. The order depends on when shards came, and is not the same twice; but each row comes once: a shard
    counts by its number, and one that was extracted again in a repair is not given again. Every consumer looks at the run by itself.

    Besides its buffer, which it keeps from epoch to epoch, a worker keeps at most 256 MiB of token ids, and where their rows lie; of a run
    with loss masks these too, a bit a token.

    Raises:
        ConfigError: an option makes no sense.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec, options: StreamOptions, idle_s: float) -> None:
        require_share(options.rank, options.world_size, options.seed)
        require_positive(batch_rows=options.batch_rows, shuffle_buffer_bytes=options.shuffle_buffer_bytes, idle_s=idle_s)
        self._catalogue = catalogue
        self._spec = spec
        self._options = options
        self._idle_s = idle_s
        of = [catalogue.job.run_id, spec.site, str(spec.layer)] if options.follow else catalogue.parts_of(spec)["key"].to_pylist()
        self._fingerprint = xxhash.xxh3_128_hexdigest("\n".join(of).encode())
        self._epoch = 0
        self._rows_given = 0
        self._groups: list[list[int]] = []
        self._resumed: Mapping[str, Any] | None = None
        # Of the process that iterates alone: a forked worker must not wait for its parent's threads.
        self._held: tuple[int, OpenParts, WindowMemory] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first row."""
        self._epoch, self._rows_given, self._groups, self._resumed = epoch, 0, [], None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as plain values: the batches given so far are behind it.

        With workers this is each worker's own state, which torchdata's StatefulDataLoader collects.
        """
        position = {"epoch": self._epoch, "rows_given": self._rows_given, "groups": [list(group) for group in self._groups]}
        return {**asdict(self._options), **self._place(), **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken.

        Raises:
            ConfigError: it was taken of another run or layer, or with other options.
        """
        require_same(state, {**asdict(self._options), "parts": self._fingerprint})
        self._epoch, self._rows_given, self._resumed = int(state["epoch"]), int(state["rows_given"]), dict(state)
        self._groups = [list(group) for group in state["groups"]]

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the first on, or from where a loaded state stood.

        Raises:
            ConfigError: the loaded state was taken with another number of workers.
            RunDamagedError: a file is not what its commit says.
            NotInRunError: the run that is followed gave no sign of life for `idle_s`.
        """
        skip_rows, groups = 0, []
        if self._resumed is not None:
            require_same(self._resumed, self._place())
            skip_rows, groups = self._rows_given, self._groups
        self._rows_given, self._groups, self._resumed = skip_rows, groups, None
        if self._held is None or self._held[0] != os.getpid():
            self._held = (os.getpid(), OpenParts(self._catalogue, self._spec), WindowMemory(self._spec.row_bytes))
        _, parts, memory = self._held
        for batch in self._windows(parts, memory, groups).batches(self._options.batch_rows, skip_rows):
            self._rows_given += len(batch["sequence_id"])
            yield batch

    def _place(self) -> dict[str, Any]:
        return {"parts": self._fingerprint, **consumer_of(self._options.rank, self._options.world_size), "dealt": "by shard"}

    def _windows(self, parts: OpenParts, memory: WindowMemory, groups: list[list[int]]) -> Windows:
        options, place = self._options, consumer_of(self._options.rank, self._options.world_size)
        consumer, consumers = place["consumer"], place["consumers"]
        sizes = WindowSizes.of(options.shuffle_buffer_bytes, self._spec.row_bytes)
        seeds = [options.seed, self._epoch, consumer]
        if options.follow:
            arrivals = Arrivals(self._catalogue, parts, groups, self._idle_s)
            more, most_rows = _as_they_come(arrivals, parts, sizes.block_rows, seeds, consumers), self._catalogue.job.counts.rows
        else:
            order = in_random_order(parts.rows, sizes.block_rows, parts.kept // 2, np.random.default_rng([options.seed, self._epoch]))
            more, most_rows = _at_once(_dealt(order, parts, sizes.block_rows, consumer, consumers)), int(parts.rows.sum())
        return Windows(parts, memory, sizes, most_rows, more, seeds, is_remote=self._catalogue.store.folder is None)


def _dealt(blocks: Blocks, parts: OpenParts, block_rows: int, consumer: int, consumers: int) -> Blocks:
    """A consumer's share of some blocks.

    The blocks of a shard are dealt out in their order, beginning with another consumer for each shard. So all know their share of a shard
    without a word, whichever shards each of them has seen by now.
    """
    dealt_to = (blocks[:, 1] // block_rows + parts.shards[blocks[:, 0]]) % consumers
    dealt: Blocks = blocks[dealt_to == consumer]
    return dealt


def _at_once(blocks: Blocks) -> MoreBlocks:
    """All blocks of an epoch, then no more."""
    left = [blocks]
    return lambda _: left.pop() if left else None


def _as_they_come(arrivals: Arrivals, parts: OpenParts, block_rows: int, seeds: list[int], consumers: int) -> MoreBlocks:
    """A consumer's share of each group of shards."""
    number = 0

    def more(wait: bool) -> Blocks | None:  # noqa: FBT001 - it is MoreBlocks
        nonlocal number
        group = arrivals.more(wait=wait)
        if group is None:
            return None
        members = np.array(group)
        rows = parts.rows[members]
        # By the group's own parts: a stream that goes on with a state may know of longer ones.
        blocks = in_random_order(rows, block_rows, parts.kept_of(rows) // 2, np.random.default_rng([*seeds, number, 1]))
        blocks[:, 0] = members[blocks[:, 0]]
        number += 1
        return _dealt(blocks, parts, block_rows, seeds[-1], consumers)

    return more
