"""OpenParts: the parts of one layer that a stream reads from, opened when they are first asked for."""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

import numpy.typing as npt

from m2ray.activations.manifest import receipts_of
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.pages import PartPages
from m2ray.batches import TOKEN_ROW, Int64Array, PartSpec

_TOKENS_KEPT_BYTES = 256 << 20


class OpenParts:
    """The parts of a layer by their number: where their rows lie, and which tokens these are. Those used last are kept.

    Any number of threads may ask; one opens a part, the others wait.
    """

    def __init__(self, catalogue: Catalogue, spec: PartSpec) -> None:
        self._catalogue = catalogue
        self._spec = spec
        self._table = catalogue.parts_of(spec)
        self.rows: Int64Array = self._table["rows"].to_numpy()
        self.kept = max(2, _TOKENS_KEPT_BYTES // (int(self.rows.max(initial=1)) * TOKEN_ROW.itemsize))
        self._opened: OrderedDict[int, Future[tuple[PartPages, npt.NDArray[Any]]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, part: int) -> tuple[PartPages, npt.NDArray[Any]]:
        with self._lock:
            is_new = part not in self._opened
            opened = self._opened.setdefault(part, Future())
            self._opened.move_to_end(part)
            if len(self._opened) > self.kept:
                self._opened.popitem(last=False)
        if is_new:
            try:
                (receipt,) = receipts_of(self._table.slice(part, 1))
                reader = self._catalogue.open_part(self._spec, receipt)
                opened.set_result((reader.pages(), reader.tokens()))
            except BaseException as error:
                with self._lock:
                    self._opened.pop(part, None)  # whoever asks later tries again
                opened.set_exception(error)
                raise
        return opened.result()
