"""Samples: a finished run sequence by sequence, each with its tokens, its loss mask and its states of the chosen layers."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.pages import PartPages
from m2ray.batches import Bits, Int32Array, Int64Array, PartSpec, SequenceFile
from m2ray.errors import NotInRunError, RunDamagedError, in_ranges
from m2ray.sequences import read_sequences
from m2ray.storage import scratch

if TYPE_CHECKING:
    import torch

SITE = "residual"
NORMED = "final_norm"
"""The site of the last layer's output behind the final norm."""

_WINDOW_BYTES = 32 << 20


@dataclass(frozen=True)
class Sample:
    """One sequence. Its arrays are memory that the next sample may take: use them, or copy them, before asking for it.

    Attributes:
        index: its place in the export, from 0: shard by shard, and by sequence id inside of a shard.
        sequence_id, row_id: which row of the source it is.
        token_ids: int32 [T].
        loss_mask: uint8 [T], 0 or 1; None where the prompts gave none.
        bits: its states, uint8 [T, L, W * itemsize], the layers in the order in which they were asked for.
        dtype: of the states, torch's name.
    """

    index: int
    sequence_id: int
    row_id: str
    token_ids: Int32Array
    loss_mask: npt.NDArray[np.uint8] | None
    bits: Bits
    dtype: str

    @property
    def states(self) -> "torch.Tensor":
        """The states as a tensor [T, L, W] over the same memory."""
        import torch

        return torch.from_numpy(self.bits).view(getattr(torch, self.dtype))


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is read from: where its first sample stands, the pages of each layer, and its token ids int32 [N]."""

    number: int
    pages: tuple[PartPages, ...]
    token_ids: Int32Array


class Samples:
    """All ready sequences of a finished run, in order: by shard, and by sequence id inside of a shard.

    In memory are a window of 32 MiB of states (one sequence, if it is longer), and of `sequences/` one file.

    Attributes:
        sequence_ids, token_counts, shards: of every sample, [S].
        layers: those that are read, in this order.
        is_normed: whether the last of them is read behind the final norm, as the run has it at the site `final_norm`.

    Raises:
        NotInRunError: the run has not all of these layers.
        RunDamagedError, StoreError: its records cannot be read.
    """

    def __init__(self, catalogue: Catalogue, layers: Sequence[int], *, is_normed: bool = False) -> None:
        self._catalogue = catalogue
        self.layers = tuple(layers)
        self.is_normed = is_normed
        by_layer = {part.layer: part for part in catalogue.job.parts if part.site == SITE}
        if is_normed:
            by_layer[layers[-1]] = next(part for part in catalogue.job.parts if part.site == NORMED)
        absent = [layer for layer in layers if layer not in by_layer]
        if absent:
            raise absent_layers(catalogue, absent)
        self._specs: tuple[PartSpec, ...] = tuple(by_layer[layer] for layer in layers)
        self._files = catalogue.job.sequence_files
        self._first_ids = [0, *accumulate(file.rows for file in self._files)][:-1]
        self._held: tuple[SequenceFile, Any] | None = None
        self._open: _OpenShard | None = None
        self.sequence_ids, self.token_counts, self.shards = self._ready()
        self._ends = np.cumsum(self.token_counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self) else 0

    @property
    def dtype(self) -> str:
        """Of the states, torch's name."""
        return self._specs[0].columns[0].dtype

    @property
    def width(self) -> int:
        """Elements of a state of one layer."""
        return self._specs[0].columns[0].width

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's states of all layers."""
        return sum(spec.row_bytes for spec in self._specs)

    def without_mask(self) -> Int64Array:
        """The ids of the sequences that have no loss mask. Reads `sequences/`, a file at a time."""
        lacking = []
        for file, first_id in zip(self._files, self._first_ids, strict=True):
            table = read_sequences(self._catalogue.store, file, ["status", "loss_mask"])
            is_ready = pc.equal(table["status"], "ready")
            found = pc.and_(is_ready, pc.is_null(table["loss_mask"])) if "loss_mask" in table.column_names else is_ready
            lacking.append(np.flatnonzero(found.to_numpy()) + first_id)
        return np.concatenate([np.empty(0, np.int64), *lacking])

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """The samples [start, stop), each valid until the next is asked for.

        Raises:
            RunDamagedError: a file is not what was written.
            StoreError: a file cannot be read.
        """
        while start < stop:
            end = self._window_end(start, stop)
            yield from self._window(start, end)
            start = end

    def _window_end(self, start: int, stop: int) -> int:
        """Where the window that begins at a sample ends: inside of a shard, after at most 32 MiB, but after one sample at least."""
        before = self._ends[start] - self.token_counts[start]
        fitting = int(np.searchsorted(self._ends, before + _WINDOW_BYTES // self.token_bytes, "right"))
        return min(stop, max(start + 1, fitting), int(np.searchsorted(self.shards, self.shards[start], "right")))

    def _window(self, start: int, stop: int) -> Iterator[Sample]:
        """The samples [start, stop), all of one shard, read at once."""
        shard = self._shard(int(self.shards[start]))
        first_sample = int(np.searchsorted(self.shards, shard.number))
        row_ids, masks = self._facts(self.sequence_ids[start:stop])
        begin = int(self._ends[first_sample] - self.token_counts[first_sample])
        ends = (self._ends[start:stop] - begin).tolist()
        row = first_row = ends[0] - int(self.token_counts[start])
        bits = self._states(shard, first_row, ends[-1])
        for index, end, row_id, mask in zip(range(start, stop), ends, row_ids, masks, strict=True):
            if mask is not None and len(mask) != end - row:
                raise RunDamagedError(
                    f"The loss mask of sequence {self.sequence_ids[index]} has {len(mask)} entries for {end - row} tokens."
                )
            token_ids, states = shard.token_ids[row:end], bits[row - first_row : end - first_row]
            yield Sample(index, int(self.sequence_ids[index]), row_id, token_ids, mask, states, self.dtype)
            row = end

    def _states(self, shard: _OpenShard, start: int, stop: int) -> Bits:
        """The rows [start, stop) of a shard, each layer's laid where it belongs: uint8 [N, L, W * itemsize], good until the next call."""
        num_rows, num_layers = stop - start, len(self.layers)
        bits = np.frombuffer(scratch("samples", num_rows * self.token_bytes), np.uint8).reshape(num_rows * num_layers, -1)
        rows = np.arange(start, stop)
        for number, pages in enumerate(shard.pages):
            pages.take(rows, bits, np.arange(number, len(bits), num_layers))
        return bits.reshape(num_rows, num_layers, -1)

    def _shard(self, number: int) -> _OpenShard:
        if self._open is None or self._open.number != number:
            readers = []
            for spec in self._specs:
                receipt = self._catalogue.part_of_shard(spec, number)
                if receipt is None:
                    raise NotInRunError(f"Shard {number} of the run at {self._catalogue.store.url} is not committed.", "Finish the run.")
                readers.append(self._catalogue.open_part(spec, receipt))
            tokens = readers[0].tokens()
            self._require_all_tokens(number, tokens)
            self._open = _OpenShard(number, tuple(reader.pages() for reader in readers), tokens["token_id"].copy())
        return self._open

    def _require_all_tokens(self, shard: int, tokens: npt.NDArray[Any]) -> None:
        of = slice(*np.searchsorted(self.shards, [shard, shard + 1]).tolist())
        ids, counts = self.sequence_ids[of], self.token_counts[of]
        first_rows = np.cumsum(counts, dtype=np.int64) - counts
        positions = np.arange(counts.sum(dtype=np.int64)) - np.repeat(first_rows, counts)
        if not (np.array_equal(tokens["sequence_id"], np.repeat(ids, counts)) and np.array_equal(tokens["position"], positions)):
            raise RunDamagedError(f"Shard {shard} of the run at {self._catalogue.store.url} does not hold every token of its sequences.")

    # -- sequences/ ---------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[Int64Array, Int32Array, Int32Array]:
        """sequence_id, token_count and shard of the ready sequences, in the order of the samples."""
        columns = ["sequence_id", "token_count", "shard"]
        tables = [read_sequences(self._catalogue.store, file, columns) for file in self._files]
        table = pa.concat_tables(table.filter(pc.is_valid(table["shard"])) for table in tables)
        ids, counts, shards = (table[name].to_numpy() for name in columns)
        order = np.lexsort((ids, shards))
        return ids[order], counts[order], shards[order].astype(np.int32, copy=False)

    def _facts(self, ids: Int64Array) -> tuple[list[str], list[npt.NDArray[np.uint8] | None]]:
        """row_id and loss mask of these ascending sequence ids."""
        row_ids: list[str] = []
        masks: list[npt.NDArray[np.uint8] | None] = []
        while len(ids):
            number = bisect_right(self._first_ids, int(ids[0])) - 1
            first_id, file = self._first_ids[number], self._files[number]
            here = ids[: np.searchsorted(ids, first_id + file.rows)]
            table = self._table(file).take(here - first_id)
            row_ids += table["row_id"].to_pylist()
            masks += _masks(table["loss_mask"].combine_chunks()) if "loss_mask" in table.column_names else [None] * len(here)
            ids = ids[len(here) :]
        return row_ids, masks

    def _table(self, file: SequenceFile) -> Any:
        if self._held is None or self._held[0] != file:
            self._held = (file, read_sequences(self._catalogue.store, file, ["row_id", "loss_mask"]))
        return self._held[1]


def absent_layers(catalogue: Catalogue, absent: Sequence[int]) -> NotInRunError:
    """What is said of layers that a run does not have."""
    has = in_ranges(part.layer for part in catalogue.job.parts if part.site == SITE and part.layer is not None) or "none"
    return NotInRunError(
        f"The run at {catalogue.store.url} has no residual of layer {in_ranges(sorted(absent))}.",
        f"It has layers {has}: name others (--layers), or extract these.",
    )


def _masks(column: Any) -> list[npt.NDArray[np.uint8] | None]:
    """Each list of a pyarrow ListArray of uint8 as an array; None where it is null."""
    values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    return [None if null else values[start:stop] for start, stop, null in zip(offsets[:-1], offsets[1:], is_null, strict=True)]
