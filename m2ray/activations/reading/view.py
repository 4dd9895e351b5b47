"""A run, or a view of some of its sites and layers: what it is and holds. Nothing here reads rows."""

from collections.abc import Sequence
from typing import Any, Self

import pyarrow.compute as pc

from m2ray.activations.job import JobRecord
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.shown import as_html, as_line
from m2ray.batches import PartSpec
from m2ray.errors import NotInRunError, did_you_mean, in_ranges


class RunView:
    """A run, or a view of some of its sites and layers. Narrowing reads nothing and may be chained in any order.

    A view narrowed by `layer(i)`, or to a site of the whole model, is a *one-layer view*: its tensors have no layer axis,
    as with an index. All other views keep that axis, in the order of `layer_numbers`, even if it is 1 long.
    """

    def __init__(self, catalogue: Catalogue, parts: Sequence[PartSpec], *, has_layer_axis: bool) -> None:
        self._catalogue = catalogue
        self._parts = tuple(parts)
        self._has_layer_axis = has_layer_axis

    def __repr__(self) -> str:
        return as_line(self, self._catalogue.store.url)

    def _repr_html_(self) -> str:
        return as_html(self, self._catalogue.store.url)

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
        return len(self._catalogue.committed)

    @property
    def committed_shards(self) -> Sequence[int]:
        """The numbers of the committed shards, ascending."""
        return self._catalogue.committed

    @property
    def num_rows(self) -> int:
        """Committed rows of every site and layer: of each token one, where nothing else was chosen. Of a run of statistics alone 0."""
        return _sum(self._catalogue.parts_of(self.job.parts[0])["rows"]) if self.job.parts else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the committed sequences. Raises as `sequences` does."""
        return self.num_rows if self.job.selection.is_all and self.job.parts else self._catalogue.num_tokens()

    @property
    def sequences(self) -> Any:
        """Every row of the source: pyarrow table of sequence_id, row_id, prompt_digest, token_count, shard, status, reason,
        loss_mask (list<uint8>, one 0 or 1 a token; null where the prompts gave none), roles (list of role, start, stop: the tokens
        [start, stop) of a chat's messages; null where unknown), row_count (its rows in every part) and documents (of packed prompts: list of
        row_id, start, offset; else null); behind them the columns that `keep_columns` names. Where prompts are packed, a row is a context.

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
    def parts(self) -> tuple[PartSpec, ...]:
        """The sites and layers of this view, each with its columns."""
        return self._parts

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of this view."""
        return tuple(dict.fromkeys(part.site for part in self._parts))

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers of this view, in its order; empty for a site of the whole model."""
        return tuple(dict.fromkeys(part.layer for part in self._parts if part.layer is not None))

    @property
    def num_files(self) -> int:
        """Committed parts of this view."""
        return sum(len(self._catalogue.parts_of(part)) for part in self._parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the committed parts of this view."""
        return sum(_sum(self._catalogue.parts_of(part)["num_bytes"]) for part in self._parts)

    def site(self, name: str) -> Self:
        """The view of one site. Raises NotInRunError if this view has none of that name."""
        parts = [part for part in self._parts if part.site == name]
        if not parts:
            self._first_part()
            raise NotInRunError(
                f"There is no site {name!r} in this view of {self._catalogue.store.url}.",
                f"{did_you_mean(name, self.sites)}It has: {', '.join(self.sites)}.",
            )
        return type(self)(self._catalogue, parts, has_layer_axis=self._has_layer_axis and parts[0].layer is not None)

    def layer(self, number: int) -> Self:
        """The one-layer view of layer `number`, counted from 0. Raises NotInRunError if this view has no such layer."""
        return type(self)(self._catalogue, self._of_layers([number]), has_layer_axis=False)

    def layers(self, numbers: Sequence[int]) -> Self:
        """The view of some layers, in this order, which keeps its layer axis. Raises NotInRunError if this view has not all of them."""
        return type(self)(self._catalogue, self._of_layers(numbers), has_layer_axis=True)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _one_layer(self) -> PartSpec:
        """The parts of a one-layer view. Raises NotInRunError if it has several layers or sites."""
        if len(self._one_site()) > 1:
            raise NotInRunError(f"This view has layers {in_ranges(self.layer_numbers)}.", "Choose one with .layer(NUMBER).")
        return self._parts[0]

    def _require_one_tensor(self) -> None:
        """Raise NotInRunError where rows are no tensor but several by column."""
        columns = [column.name for column in self._one_layer().columns]
        if "activation" not in columns:
            raise NotInRunError(f"Rows of {self.sites[0]} have the columns {', '.join(columns)}.", "Read them with stream() or tensor().")

    def _of_layers(self, numbers: Sequence[int]) -> list[PartSpec]:
        absent = [number for number in numbers if number not in self.layer_numbers]
        if absent:
            self._first_part()
            has = f"It has layers {in_ranges(self.layer_numbers)}." if self.layer_numbers else "It has no layers."
            raise NotInRunError(f"There is no layer {in_ranges(absent)} in this view of {self._catalogue.store.url}.", has)
        return [part for number in dict.fromkeys(numbers) for part in self._parts if part.layer == number]

    def _first_part(self) -> PartSpec:
        """Any part of the view. Raises NotInRunError if it has none: the run keeps no rows, or no layer was chosen."""
        if not self.job.parts:
            raise NotInRunError(f"The run at {self._catalogue.store.url} keeps no rows.", "It has .statistics(SITE, LAYER).")
        if not self._parts:
            raise NotInRunError(f"This view of {self._catalogue.store.url} has no layers.", "Choose some of the run's.")
        return self._parts[0]

    def _one_site(self) -> tuple[PartSpec, ...]:
        """The parts of a view that has one width and dtype. Raises NotInRunError if it has several sites, or no rows."""
        self._first_part()
        if len(self.sites) > 1:
            raise NotInRunError(f"This view has the sites {', '.join(self.sites)}.", "Choose one with .site(NAME).")
        return self._parts


def _sum(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)
