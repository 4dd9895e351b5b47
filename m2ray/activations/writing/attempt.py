"""Attempt: one stage's parts of a shard, from the first micro-batch to the last, and how far they are."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.activations.schema import encode_tokens
from m2ray.activations.writing.order import Order
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt
from m2ray.errors import StageError
from m2ray.parquet.column_chunks import EncodedColumns
from m2ray.selection import Selection

_DEFECT = "This is a defect of m2ray."


class Attempt:
    """One attempt at a shard. Not locked: one thread admits micro-batches, and the writer's lock guards the rest.

    Attributes:
        parts: a writer for each layer and site that is captured.
        order: of the micro-batches at its parts.
        failure: the first error of any part.
        finishes: by part whose last row group is written, the call that makes it durable.
        aborts: once it failed, the call for each part that deletes it.
    """

    finishes: dict[PartWriter, Future[None]]
    aborts: list[Future[None]]

    def __init__(self, shard: int, name: str, parts: Sequence[PartWriter]) -> None:
        self.parts = parts
        self._label = f"Shard {shard}, attempt {name}"
        self.order = Order(self._label, [(part.spec.site, part.spec.layer) for part in parts])
        self.failure: BaseException | None = None
        self._encoded: tuple[int, npt.NDArray[Any], EncodedColumns] | None = None
        self.finishes = {}
        self.aborts = []

    def token_columns(self, micro_batch: MicroBatch, selection: Selection) -> tuple[npt.NDArray[Any], EncodedColumns]:
        """TOKEN_ROW [N] of a micro-batch's chosen tokens, and these encoded: once for all its layers, however many come at a time."""
        if self._encoded is None or self._encoded[0] != micro_batch.index:
            token_rows = selection.token_rows(micro_batch)
            self._encoded = micro_batch.index, token_rows, encode_tokens(token_rows)
        return self._encoded[1:]

    def receipts(self) -> tuple[PartReceipt, ...] | None:
        """The parts' receipts, in order, once all are durable; None before."""
        finished = [part for part in self.parts if part in self.finishes and self.finishes[part].done()]
        receipts = tuple(part.receipt for part in finished if part.receipt is not None)
        return receipts if len(receipts) == len(self.parts) else None

    def matched(self, num_rows: int, captured: Sequence[CapturedLayer]) -> dict[int, CapturedLayer]:
        """What was captured by its part's number in `parts`. Raises StageError unless it is what these parts need."""
        kept = [layer for layer in captured if layer.columns]
        by_name = {(layer.site, layer.layer): layer for layer in kept}
        numbers = {(part.spec.site, part.spec.layer): number for number, part in enumerate(self.parts)}
        if not by_name.keys() <= numbers.keys() or len(kept) != len(by_name):
            wanted = sorted(numbers, key=str)
            raise StageError(f"{self._label}: captured {[(c.site, c.layer) for c in kept]}, not of {wanted} each once.", _DEFECT)
        found = {number: by_name[place] for place, number in numbers.items() if place in by_name}
        for number, layer in found.items():
            spec, columns = self.parts[number].spec, layer.columns
            shapes = [(num_rows, column.row_bytes) for column in spec.columns]
            if [values.shape for values in columns] != shapes or any(values.dtype != np.uint8 for values in columns):
                came = ", ".join(f"{values.dtype} {list(values.shape)}" for values in columns)
                needed = ", ".join(f"uint8 {list(shape)}" for shape in shapes)
                raise StageError(f"{self._label}: {spec} was captured as {came}, not as {needed}.", _DEFECT)
            if layer.crcs and [crcs.shape for crcs in layer.crcs] != [(num_rows,)] * len(columns):
                raise StageError(f"{self._label}: {spec} came with other CRCs than one a row and column.", _DEFECT)
        return found
