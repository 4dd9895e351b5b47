"""OpenParts: the parts of one layer that a stream reads from, opened when they are first asked for."""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2ray.activations.manifest import receipts_of
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.later_commits import parts_since, repaired
from m2ray.activations.reading.loss_masks import LossMasks
from m2ray.activations.reading.pages import PartPages
from m2ray.activations.reading.part_reader import PartReader
from m2ray.batches import TOKEN_ROW, Int64Array, PartSpec
from m2ray.errors import RunDamagedError

_TOKENS_KEPT_BYTES = 256 << 20


class OpenParts:
    """The parts of a layer by their number: where their rows lie, and which tokens these are. Those used last are kept.

    Any number of threads may ask; one opens a part, the others wait.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec) -> None:
        self.spec = spec
        self._catalogue = catalogue
        self.masks = LossMasks(catalogue)
        self._opened: OrderedDict[int, Future[tuple[PartPages, npt.NDArray[Any]]]] = OrderedDict()
        self._lock = threading.Lock()
        self._know(catalogue.parts_of(spec))

    @cached_property
    def token_dtype(self) -> np.dtype[Any]:
        """What is known of each row's token: TOKEN_ROW, and `loss_mask` uint8 if the run has masks; a mean is of no one token. Raises as
        LossMasks does.
        """
        has_masks = not self._catalogue.job.selection.is_mean and self.masks.are_there()
        return np.dtype([*_fields(TOKEN_ROW), ("loss_mask", "u1")]) if has_masks else TOKEN_ROW

    @cached_property
    def kept(self) -> int:
        """How many are kept, at least 2. Raises as LossMasks does."""
        return self.kept_of(self.rows)

    def kept_of(self, rows: Int64Array) -> int:
        """How many would be kept if the parts with these rows were all. Raises as LossMasks does."""
        return max(2, _TOKENS_KEPT_BYTES // (int(rows.max(initial=1)) * self.token_dtype.itemsize))

    def look(self) -> None:
        """Add the parts that were committed since, behind the others. Raises as parts_since does."""
        found = parts_since(self._catalogue, self.spec, self.shards.tolist())
        if len(found):
            self._know(pa.concat_tables([self._table, found]).combine_chunks())

    def _know(self, table: Any) -> None:
        self._table = table
        self.rows: Int64Array = table["rows"].to_numpy()
        self.shards: npt.NDArray[np.int32] = table["shard"].to_numpy()
        self.__dict__.pop("kept", None)

    def __call__(self, part: int) -> tuple[PartPages, npt.NDArray[Any]]:
        """Where a part's rows lie, and `token_dtype` [N]. Raises RunDamagedError or StoreError."""
        with self._lock:
            is_new = part not in self._opened
            opened = self._opened.setdefault(part, Future())
            self._opened.move_to_end(part)
            if len(self._opened) > self.kept:
                self._opened.popitem(last=False)
        if is_new:
            try:
                reader = self._reader(part)
                opened.set_result((reader.pages(), self._with_masks(reader.tokens())))
            except BaseException as error:
                with self._lock:
                    self._opened.pop(part, None)  # whoever asks later tries again
                opened.set_exception(error)
                raise
        return opened.result()

    def _reader(self, part: int) -> PartReader:
        """A part, or if its shard was repaired since, the one that counts now: its rows are the same ones."""
        (receipt,) = receipts_of(self._table.slice(part, 1))
        try:
            return self._catalogue.open_part(self.spec, receipt)
        except RunDamagedError:
            now = repaired(self._catalogue, self.spec, receipt)
            if now is None:
                raise
            return self._catalogue.open_part(self.spec, now)

    def _with_masks(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.token_dtype == TOKEN_ROW:
            return tokens
        rows = np.empty(len(tokens), self.token_dtype)
        for name in TOKEN_ROW.names or ():
            rows[name] = tokens[name]
        rows["loss_mask"], _ = self.masks.of(tokens["sequence_id"], tokens["position"])
        return rows


def _fields(dtype: np.dtype[Any]) -> list[tuple[str, str]]:
    return [(name, dtype[name].str) for name in dtype.names or ()]
