"""LossMasks: which tokens a trainer's loss counts, of any rows by their sequences and positions."""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.batches import Bits, Int64Array
from m2ray.errors import RunDamagedError

_COLUMN = "loss_mask"
_PackedMasks = tuple[Int64Array, Bits]
"""Where each sequence's mask begins, -1 where it has none; and the bits of all of them, eight tokens a byte, the first one lowest."""


class LossMasks:
    """The column `loss_mask` of a run's `sequences/`. Files are read as they are asked for, and kept: a bit a token, 8 bytes a sequence.

    Any number of threads may ask. All methods raise RunDamagedError if a file is not the one that was written, and StoreError.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._first_ids = np.array(catalogue.first_ids, np.int64)
        self._files: dict[int, _PackedMasks] = {}
        self._lock = threading.Lock()

    def are_there(self) -> bool:
        """Whether any sequence has a mask. Where none has, this reads all of `sequences/` once."""
        return any((self._file(number)[0] >= 0).any() for number in range(len(self._first_ids)))

    def of(self, sequence_ids: Int64Array, positions: npt.NDArray[np.int32]) -> tuple[Bits, npt.NDArray[np.bool_]]:
        """Whether each row's token counts, uint8 [N] of 0 and 1; and whether its sequence has a mask, bool [N]. Where it has none: 1."""
        counts, is_known = np.ones(len(sequence_ids), np.uint8), np.zeros(len(sequence_ids), np.bool_)
        files = np.searchsorted(self._first_ids, sequence_ids, "right") - 1
        for number in np.unique(files).tolist():
            starts, bits = self._file(number)
            rows = np.flatnonzero(files == number)
            begins = starts[sequence_ids[rows] - self._first_ids[number]]
            rows, begins = rows[begins >= 0], begins[begins >= 0]
            at = begins + positions[rows]
            counts[rows] = bits[at >> 3] >> (at & 7).astype(np.uint8) & 1
            is_known[rows] = True
        return counts, is_known

    def _file(self, number: int) -> _PackedMasks:
        with self._lock:
            if number not in self._files:
                table = self._catalogue.sequences_of_file(number, ["token_count", _COLUMN])
                try:
                    self._files[number] = _packed(table)
                except ValueError as error:
                    file = self._catalogue.job.sequence_files[number]
                    what = f"{self._catalogue.store.where(file.key)} is damaged: {error}."
                    raise RunDamagedError(what, "Restore it from a copy, or begin a new run in another folder.") from None
            return self._files[number]


def _packed(table: Any) -> _PackedMasks:
    """Raises ValueError if a mask does not have as many values as its sequence has tokens."""
    if _COLUMN not in table.column_names:  # the run is older than masks
        return np.full(len(table), -1, np.int64), np.empty(0, np.uint8)
    starts, bits, num_bits = [np.empty(0, np.int64)], [np.empty(0, np.uint8)], 0
    for batch in table.to_batches():
        masks = batch.column(_COLUMN)
        is_none = masks.is_null().to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(pc.list_value_length(masks), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        if (lengths != batch.column("token_count").to_numpy())[~is_none].any():
            raise ValueError(f"a {_COLUMN} has not one value a token")
        starts.append(np.where(is_none, -1, num_bits + np.cumsum(lengths) - lengths))
        bits.append(np.packbits(pc.list_flatten(masks).to_numpy(zero_copy_only=False).astype(np.bool_), bitorder="little"))
        num_bits += 8 * len(bits[-1])
    return np.concatenate(starts), np.concatenate(bits)
