"""open_run: a run's activations as torch tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from m2ray.activations.catalogue import Catalogue
from m2ray.activations.job import JobRecord
from m2ray.activations.part_reader import PartReader
from m2ray.batches import TOKEN_ROW, Bits, PartSpec
from m2ray.errors import ConfigError
from m2ray.storage import open_store

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ShardRows:
    """One shard of a view: `tokens` TOKEN_ROW [N]; `activations` [N, W] of a one-layer view, [L, N, W] otherwise."""

    index: int
    tokens: npt.NDArray[Any]
    activations: "torch.Tensor"


def open_run(path: str | Path) -> "RunReader":
    """Open a run folder, finished or not. What is committed later is seen by opening it again.

    Every file is checked when it is read: one whose size or footer is not what its commit says is refused by name.

    Raises:
        StoreError: there is no run at `path`, or it cannot be read.
        RunDamagedError: its records cannot be understood.
        RunConflictError: a newer m2ray wrote it.
    """
    catalogue = Catalogue(open_store(path))
    return RunReader(catalogue, catalogue.job.parts, has_layer_axis=True)


class RunReader:
    """A run, or a view of some of its sites and layers. Narrowing reads nothing and may be chained in any order.

    A view narrowed by `layer(i)`, or to a site of the whole model, is a *one-layer view*: its tensors have no layer axis,
    as with an index. All other views keep that axis, in the order of `layer_numbers`, even if it is 1 long.
    """

    def __init__(self, catalogue: Catalogue, parts: Sequence[PartSpec], *, has_layer_axis: bool) -> None:
        self._catalogue = catalogue
        self._parts = tuple(parts)
        self._has_layer_axis = has_layer_axis

    # -- the run ------------------------------------------------------------------------------------------------------

    @property
    def job(self) -> JobRecord:
        """What job.json says."""
        return self._catalogue.job

    @property
    def is_complete(self) -> bool:
        """Whether the run was finished."""
        return self._catalogue.summary is not None

    @property
    def num_shards(self) -> int:
        """Committed shards; `job.num_shards` are to come in all."""
        return len(self._catalogue.parts_of(self.job.parts[0]))

    @property
    def num_tokens(self) -> int:
        """Committed tokens: rows of every layer."""
        return sum(self._catalogue.parts_of(self.job.parts[0])["rows"].to_pylist())

    @property
    def sequences(self) -> Any:
        """Every row of the source: pyarrow table of sequence_id, row_id, prompt_digest, token_count, shard, status, reason.

        Raises:
            RunDamagedError: a file of `sequences/` is not the one that was written.
        """
        return self._catalogue.sequences()

    @property
    def quarantined(self) -> Any:
        """Those rows of `sequences` that were bad, with their reasons. Raises as `sequences` does."""
        table = self.sequences
        return table.filter(pc.equal(table["status"], "quarantined"))

    # -- views --------------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of this view."""
        return tuple(dict.fromkeys(part.site for part in self._parts))

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers of this view, ascending; empty for a site of the whole model."""
        return tuple(sorted({part.layer for part in self._parts if part.layer is not None}))

    @property
    def num_files(self) -> int:
        """Committed parts of this view."""
        return sum(len(self._catalogue.parts_of(part)) for part in self._parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the committed parts of this view."""
        return sum(sum(self._catalogue.parts_of(part)["num_bytes"].to_pylist()) for part in self._parts)

    def site(self, name: str) -> "RunReader":
        """The view of one site. Raises ConfigError if this view has none of that name."""
        parts = [part for part in self._parts if part.site == name]
        if not parts:
            raise ConfigError(f"There is no site {name!r} in this view of {self._catalogue.store.url}.", f"It has: {', '.join(self.sites)}.")
        return RunReader(self._catalogue, parts, has_layer_axis=self._has_layer_axis and parts[0].layer is not None)

    def layer(self, number: int) -> "RunReader":
        """The one-layer view of layer `number`, counted from 0. Raises ConfigError if this view has no such layer."""
        return RunReader(self._catalogue, self._of_layers([number]), has_layer_axis=False)

    def layers(self, numbers: Sequence[int]) -> "RunReader":
        """The view of some layers, which keeps its layer axis. Raises ConfigError if this view has not all of them."""
        return RunReader(self._catalogue, self._of_layers(numbers), has_layer_axis=True)

    # -- activations --------------------------------------------------------------------------------------------------

    def sequence(self, sequence_id: int) -> "torch.Tensor":
        """One sequence in the store dtype: [T, W] of a one-layer view, [L, T, W] otherwise.

        Raises:
            ConfigError: there is no such sequence, it was quarantined (says why), or is not committed yet; or the view has
                several sites.
            RunDamagedError: a file is not what its commit says.
        """
        row = self._catalogue.sequence(sequence_id)
        if row.shard is None:
            raise ConfigError(f"Sequence {sequence_id} (row {row.row_id}) has no activations: it was quarantined: {row.reason}.")
        specs = self._one_site()
        bits = []
        for spec in specs:
            receipt = self._catalogue.part_of_shard(spec, row.shard)
            if receipt is None:
                raise ConfigError(f"Sequence {sequence_id} is not extracted yet: its shard {row.shard} is not committed.", "Finish the run.")
            bits.append(self._catalogue.open_part(spec, receipt).sequence(sequence_id, row.token_count))
        return self._shaped(specs, [[each] for each in bits])

    def tensor(self) -> "torch.Tensor":
        """All committed rows in the order of `tokens`: [N, W] of a one-layer view, [L, N, W] otherwise.

        It must fit into memory; `shards` goes shard by shard. Raises as `sequence` does.
        """
        specs = self._one_site()
        return self._shaped(specs, [self._bits(reader) for ...])

    def tokens(self) -> npt.NDArray[Any]:
        """Which token each row is, shard after shard: TOKEN_ROW [N] (sequence_id, position, token_id)."""

    def shards(self) -> Iterator[ShardRows]:
        """The committed shards one after the other; one is held in memory at a time. Raises as `sequence` does."""
