"""How far rows that were computed again are from the run's: their distribution by site and layer, in bounded memory, and who failed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from m2ray.activations.audits import Compared
from m2ray.activations.reading.values import tensors_of
from m2ray.batches import Column, Int64Array, PartSpec

By = Literal["transformers", "m2ray"]
Batch = Literal["alone", "recorded"]
_NO_NORM = 1e300
_LISTED = 100
_MOST_IN_DOUBT = 1 << 20
"""Rows: a wrong run has all of them in doubt, and its sample may be large."""
_AT_ONCE = 2048
_NAMES = {"transformers": "transformers' own model", "m2ray": "m2ray in other stages"}
_BATCHES = {"alone": "alone", "recorded": "in its micro-batch"}


class Doubt(NamedTuple):
    """Rows of one sequence, site and layer that differ by more than rounding mostly does from what it gives alone.

    `rows` are their places among the sequence's rows, int64 [D]; `moved`, float64 [D], how far they are, as a share of their norm, from whose.
    """

    part: PartSpec
    rows: Int64Array
    moved: npt.NDArray[np.float64]
    by: By

    def __str__(self) -> str:
        return f"{self.part} differs by {self.moved.max():.2g} of a row's norm from {_NAMES[self.by]} alone"


@dataclass
class _Layer:
    """What was found so far of one site and layer, by one of the two, in one kind of batch."""

    tolerance: float
    rows: int = 0
    same_bits: int = 0
    beyond: int = 0
    greatest: float = 0.0
    exponents: Counter[int] = field(default_factory=Counter)

    def add(self, columns: Sequence[Column], ours_NB: torch.Tensor, theirs_NB: torch.Tensor) -> npt.NDArray[np.float64]:
        """Count rows, uint8 [N, bytes of a row], and give the difference of each."""
        pieces = zip(ours_NB.split(_AT_ONCE), theirs_NB.split(_AT_ONCE), strict=True)
        return np.concatenate([np.empty(0), *(self._add(columns, *piece) for piece in pieces)])

    def _add(self, columns: Sequence[Column], ours_NB: torch.Tensor, theirs_NB: torch.Tensor) -> npt.NDArray[np.float64]:
        same_bits = (ours_NB == theirs_NB).all(dim=1).numpy()
        ours, theirs = tensors_of(columns, ours_NB), tensors_of(columns, theirs_NB)
        distance, norm = _experts_apart(ours, theirs) if isinstance(ours, dict) else _rows_apart(ours, theirs)
        moved: npt.NDArray[np.float64] = (distance / norm).nan_to_num(nan=_NO_NORM, posinf=_NO_NORM).numpy()
        moved[same_bits] = 0.0
        self.rows += len(moved)
        self.same_bits += int(same_bits.sum())
        self.greatest = max(self.greatest, float(moved.max(initial=0.0)))
        exponents, counts = np.unique(np.floor(np.log2(np.maximum(moved[~same_bits], 2.0**-64))).astype(int), return_counts=True)
        self.exponents.update(dict(zip(exponents.tolist(), counts.tolist(), strict=True)))
        if self.tolerance == 0:  # zeros of the two signs are as far apart as rows can be that have to have the same bits
            moved[~same_bits] = np.maximum(moved[~same_bits], 2.0**-64)
        self.beyond += int((moved > self.tolerance).sum())
        return moved


def _rows_apart(ours_NW: torch.Tensor, theirs_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance of each two rows, and the norm of the second."""
    return (ours_NW.double() - theirs_NW.double()).norm(dim=1), theirs_NW.double().norm(dim=1)


def _experts_apart(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the weights that experts were given, whatever their order: one that was not chosen has none."""
    ours_NK, theirs_NK = ours["expert_weights"].double(), theirs["expert_weights"].double()
    is_same_NKK = ours["expert_ids"][:, :, None] == theirs["expert_ids"][:, None, :]
    given_NK = (is_same_NKK * theirs_NK[:, None, :]).sum(dim=2)
    left_NK = theirs_NK * ~is_same_NKK.any(dim=1)
    return torch.cat([ours_NK - given_NK, left_NK], dim=1).norm(dim=1), theirs_NK.norm(dim=1)


class Differences:
    """All that an audit compares.

    Attributes:
        doubts: by sequence, what differs by more than its tolerance, where that is rounding's: it is wrong unless somebody clears it.

    Args:
        by_row: whether one row beyond its tolerance is wrong. Else some may be, whose tokens chose another expert by rounding: a layer
            is wrong if most of its rows are. Where the same bits are asked for, one row is.
    """

    def __init__(self, *, by_row: bool) -> None:
        self._by_row = by_row
        self.doubts: dict[int, list[Doubt]] = {}
        self._num_in_doubt = 0
        self._cleared: dict[int, str] = {}
        self._layers: dict[tuple[By, Batch, PartSpec], _Layer] = {}
        self._wrong: dict[int, str] = {}
        self._num_wrong: set[int] = set()

    def add(
        self,
        by: By,
        batch: Batch,
        part: PartSpec,
        tolerance: float,
        recorded_NB: torch.Tensor,
        found_NB: torch.Tensor,
        sequence_ids_N: Int64Array,
    ) -> None:
        """Compare rows of one site and layer, both as a part has them; `sequence_ids_N` says whose they are."""
        moved = self._layers.setdefault((by, batch, part), _Layer(tolerance)).add(part.columns, recorded_NB, found_NB)
        if not (self._by_row or tolerance == 0):
            return
        beyond = np.flatnonzero(moved > tolerance)
        for number in np.unique(sequence_ids_N[beyond]).tolist():
            its_own, at = beyond[sequence_ids_N[beyond] == number], np.flatnonzero(sequence_ids_N == number)[0]
            if tolerance == 0:
                self.fail(number, f"{part} differs by {moved[its_own].max():.2g} of a row's norm from {_NAMES[by]} {_BATCHES[batch]}")
                continue
            self._num_in_doubt += len(its_own)
            doubt = Doubt(part, its_own - at, moved[its_own], by)
            if self._num_in_doubt > _MOST_IN_DOUBT:
                self.fail(number, f"{doubt}; it was not looked at closely, since more than {_MOST_IN_DOUBT:,} rows do so")
            else:
                self.doubts.setdefault(number, []).append(doubt)

    def clear(self, sequence_id: int, why: str) -> None:
        """What was in doubt of a sequence is rounding."""
        del self.doubts[sequence_id]
        self._cleared[sequence_id] = why

    def fail(self, sequence_id: int, why: str) -> None:
        """A sequence is wrong; the first reason is kept."""
        self._num_wrong.add(sequence_id)
        if len(self._wrong) < _LISTED:
            self._wrong.setdefault(sequence_id, why)

    def is_wrong(self, sequence_id: int) -> bool:
        return sequence_id in self._num_wrong

    @property
    def num_wrong(self) -> int:
        return len(self._num_wrong)

    @property
    def wrong(self) -> dict[str, str]:
        """Why sequences are wrong, the first 100 that were found, by their ids as text."""
        return {str(number): why for number, why in sorted(self._wrong.items())}

    @property
    def num_cleared(self) -> int:
        return len(self._cleared)

    @property
    def cleared(self) -> dict[str, str]:
        """Why sequences are right that were in doubt, the first 100, by their ids as text."""
        return {str(number): why for number, why in sorted(self._cleared.items())[:_LISTED]}

    def compared(self) -> tuple[Compared, ...]:
        """In the order of who, which batch, site and layer."""
        return tuple(
            Compared(
                by,
                batch,
                part.site,
                part.layer,
                found.tolerance,
                found.rows,
                found.same_bits,
                found.beyond,
                found.greatest,
                {str(exponent): count for exponent, count in sorted(found.exponents.items())},
            )
            for (by, batch, part), found in sorted(self._layers.items(), key=_place)
        )

    @property
    def all_within(self) -> bool:
        """Whether no sequence is wrong, and no layer as a whole."""
        if self._by_row:
            return not (self._num_wrong or self.doubts)
        return not self._num_wrong and all(2 * found.beyond <= found.rows for found in self._layers.values())


def _place(counted: tuple[tuple[By, Batch, PartSpec], _Layer]) -> tuple[str, str, str, int]:
    by, batch, part = counted[0]
    return by, batch, part.site, -1 if part.layer is None else part.layer
