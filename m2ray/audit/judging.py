"""Rows beyond a bound, judged by transformers in float32: is it the compute dtype's rounding, or another row?

A trained model has rows in which the little that rounding changes is multiplied: bfloat16 is a quarter off there, whoever computes it. What
leaks from padding or from another sequence is as large in float32, where rounding is 65,536 times smaller. So a bound need not be wider for
such rows: they are looked at one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from m2ray.activations.job import JobRecord
from m2ray.activations.reading.values import tensors_of
from m2ray.audit.differences import Differences, Doubt
from m2ray.audit.recorded import RecordedRows
from m2ray.audit.reference import Places, Reference
from m2ray.audit.shown import chosen
from m2ray.audit.tolerance import bound, computed
from m2ray.batches import MicroBatch

_NUM_DISTURBED = 8
_STANDARD_DEVIATIONS = 3
_SHARE_OF_ROUNDING = 2**-8
_ENOUGH_WRONG = 10

Verdict = tuple[bool, str]
"""Whether what is in doubt is rounding, and what was seen, in words."""

_NOT_SHOWN: Verdict = (False, "and transformers' own layers do not show it")

Place = tuple[str, int | None]
"""A site and a layer, or None of the whole model."""

Rows = Mapping[Place, torch.Tensor]
"""One sequence's rows [N, W]."""


@dataclass(frozen=True)
class Judge:
    """Transformers' model, asked in float32 about a sequence in doubt.

    Attributes:
        job: of the run.
        recorded: its rows.
        reference: transformers' model in the run's compute dtype.
        seed: of the disturbances.
    """

    job: JobRecord
    recorded: RecordedRows
    reference: Reference
    seed: int

    def settle(
        self,
        differences: Differences,
        alone: Callable[[int], MicroBatch],
        recorded: Callable[[int], MicroBatch | None],
        on_done: Callable[[int, int], object],
    ) -> None:
        """Clear each sequence in doubt, or let it be wrong. In a run in float32 all are; after ten of other runs nobody looks at more.

        Args:
            alone: makes a sequence a micro-batch by itself.
            recorded: makes the recorded one, where its rows have transformers' bits.
            on_done: takes how many of how many sequences are settled.
        """
        in_doubt = sorted(differences.doubts.items())
        for done, (number, doubts) in enumerate(in_doubt, 1):
            if self.job.options["compute_dtype"] == "float32" or differences.is_wrong(number) or differences.num_wrong >= _ENOUGH_WRONG:
                differences.fail(number, str(doubts[0]))
                continue
            verdicts = self._verdicts(alone(number), recorded(number), doubts)
            told = [(is_rounding, f"{doubt}; {seen}") for doubt, (is_rounding, seen) in zip(doubts, verdicts, strict=True)]
            if wrong := [why for is_rounding, why in told if not is_rounding]:
                differences.fail(number, wrong[0])
            else:
                greatest = int(np.argmax([doubt.moved.max() for doubt in doubts]))
                differences.clear(number, told[greatest][1])
            on_done(done, len(in_doubt))

    def _verdicts(self, alone: MicroBatch, recorded: MicroBatch | None, doubts: Sequence[Doubt]) -> list[Verdict]:
        try:
            return self._of_rows(alone, doubts) if recorded is None else self._of_micro_batch(alone, recorded, doubts)
        except RuntimeError as error:  # torch's: no memory for float32, or a layer with weights elsewhere that it does not widen
            return [(False, f"float32 could not tell: {' '.join(str(error).split())}")] * len(doubts)

    def _of_micro_batch(self, alone: MicroBatch, recorded: MicroBatch, doubts: Sequence[Doubt]) -> list[Verdict]:
        """Of rows that have the very bits of transformers' in their recorded micro-batch: does what lies beside them change them?

        In float32 it may by float32's bound, or by a 256th of the difference that is in doubt: all else of that is rounding then. What overflows
        differs by more than any number, and so at most a whole row counts.
        """
        number = int(alone.sequence_ids[0])
        with self.reference.in_float32():
            alone_rows, beside_rows = (self._rows(batch, number, _places(doubts)) for batch in (alone, recorded))
        verdicts = []
        for doubt in doubts:
            place = (doubt.part.site, doubt.part.layer)
            if place not in alone_rows or place not in beside_rows:
                verdicts.append(_NOT_SHOWN)
                continue
            moved = _apart(beside_rows[place], alone_rows[place])[doubt.rows]
            allowed = np.maximum(computed(self.job, doubt.part, "float32"), _SHARE_OF_ROUNDING * np.minimum(doubt.moved, 1.0))
            verdicts.append((bool((moved <= allowed).all()), f"in float32 its micro-batch changes it by {moved.max():.1g}"))
        return verdicts

    def _of_rows(self, alone: MicroBatch, doubts: Sequence[Doubt]) -> list[Verdict]:
        """Of rows that no bits are known of: are they as near to transformers' in float32 as the bound says, or as its own in the compute dtype are?"""
        number = int(alone.sequence_ids[0])
        with self.reference.in_float32():
            exact = self._rows(alone, number, _places(doubts))
        verdicts: dict[int, Verdict] = {}
        beyond: dict[int, npt.NDArray[np.float64]] = {}
        for index, (part, rows, _, _) in enumerate(doubts):
            if (part.site, part.layer) not in exact:
                verdicts[index] = _NOT_SHOWN
                continue
            held_NW = tensors_of(part.columns, self.recorded.rows(part, alone.shard, [number]))
            apart = _apart(held_NW, exact[part.site, part.layer])[rows]
            verdicts[index] = (True, f"it is {apart.max():.2g} off transformers' in float32")
            if (apart > bound(self.job, part)).any():
                beyond[index] = apart
        if beyond:
            rounding = self._rounding(alone, {place: exact[place] for place in _places([doubts[index] for index in beyond])})
        for index, apart in beyond.items():
            part, rows, _, _ = doubts[index]
            if (part.site, part.layer) not in rounding:
                verdicts[index] = _NOT_SHOWN
                continue
            measured = rounding[part.site, part.layer][rows]
            counted = np.where(np.isfinite(measured), measured, 0.0)  # of a row that overflows nothing is known of rounding
            allowed = np.maximum(bound(self.job, part), _STANDARD_DEVIATIONS * counted)
            worst = int(np.argmax(apart / allowed))
            told = f"it is {apart[worst]:.2g} off transformers' in float32, of which {self.job.options['compute_dtype']} is {measured[worst]:.2g} off by itself"
            verdicts[index] = (bool((apart <= allowed).all()), told)
        return [verdicts[index] for index in range(len(doubts))]

    def _rounding(self, alone: MicroBatch, exact: Rows) -> Mapping[Place, npt.NDArray[np.float64]]:
        """How far transformers' own rows in the compute dtype are from those in float32: the root of the mean square, [N] at each place.

        They are computed eight times, from embeddings that differ by what rounding changes.
        """
        generator, squares = torch.Generator().manual_seed(self.seed), dict[Place, npt.NDArray[np.float64]]()
        for _ in range(_NUM_DISTURBED):
            for place, rows_NW in self._rows(alone, int(alone.sequence_ids[0]), exact.keys(), generator).items():
                squares[place] = squares.get(place, 0.0) + _apart(rows_NW, exact[place]) ** 2
        return {place: np.sqrt(sums / _NUM_DISTURBED) for place, sums in squares.items()}

    def _rows(self, batch: MicroBatch, number: int, places: Places, disturbed_by: torch.Generator | None = None) -> Rows:
        """One sequence's chosen rows, of those places that the model shows."""
        is_its_own_N = torch.from_numpy(self.job.selection.token_rows(batch)["sequence_id"] == number)
        found = {}

        def on_site(site: str, layer: int | None, values_BTW: torch.Tensor) -> None:
            found[site, layer] = chosen(values_BTW.to("cpu"), self.job.selection, batch)[is_its_own_N]

        self.reference.run(torch.from_numpy(batch.token_ids_BT).long(), places, on_site, disturbed_by=disturbed_by)
        return found


def _places(doubts: Sequence[Doubt]) -> Places:
    return {(doubt.part.site, doubt.part.layer) for doubt in doubts}


def _apart(rows_NW: torch.Tensor, exact_NW: torch.Tensor) -> npt.NDArray[np.float64]:
    """The distance of each two rows, as a share of the second's norm."""
    exact_NW = exact_NW.double()
    apart: npt.NDArray[np.float64] = (
        ((rows_NW.double() - exact_NW).norm(dim=1) / exact_NW.norm(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf).numpy()
    )
    return apart
