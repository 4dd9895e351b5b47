"""Attempt: one stage's parts of a shard, from the first micro-batch to the last: what may come next, and how far the parts are."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from m2ray.activations.schema import encode_tokens
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt
from m2ray.errors import StageError
from m2ray.parquet.column_chunks import EncodedColumns

_DEFECT = "This is a defect of m2ray."


class Attempt:
    """One attempt at a shard. Not locked: one thread admits micro-batches, and the writer's lock guards the rest.

    Attributes:
        parts: a writer for each layer and site that is captured.
        digest: xxh3-128 over the token rows so far.
        is_complete: the last micro-batch was admitted.
        failure: the first error of any part.
        finishes: by part whose last row group is written, the call that makes it durable.
        aborts: once it failed, the call for each part that deletes it.
    """

    finishes: dict[PartWriter, Future[None]]
    aborts: list[Future[None]]

    def __init__(self, shard: int, name: str, parts: Sequence[PartWriter]) -> None:
        self.parts = parts
        self.digest = xxhash.xxh3_128()
        self.is_complete = False
        self.failure: BaseException | None = None
        self.finishes = {}
        self.aborts = []
        self._label = f"Shard {shard}, attempt {name}"
        self._next_index = 0
        self._last_sequence_id = -1

    def receipts(self) -> tuple[PartReceipt, ...] | None:
        """The parts' receipts, in order, once all are durable; None before."""
        finished = [part for part in self.parts if part in self.finishes and self.finishes[part].done()]
        receipts = tuple(part.receipt for part in finished if part.receipt is not None)
        return receipts if len(receipts) == len(self.parts) else None

    def matched(self, num_rows: int, captured: Sequence[CapturedLayer]) -> list[tuple[Bits, ...]]:
        """The captured columns in the order of the parts. Raises StageError unless they are exactly what the parts need."""
        kept = [layer for layer in captured if layer.columns]
        by_name = {(layer.site, layer.layer): layer.columns for layer in kept}
        wanted = {(part.spec.site, part.spec.layer) for part in self.parts}
        if by_name.keys() != wanted or len(kept) != len(self.parts):
            raise StageError(f"{self._label}: captured {[(c.site, c.layer) for c in kept]}, not {sorted(wanted, key=str)}.", _DEFECT)
        for part in self.parts:
            columns = by_name[part.spec.site, part.spec.layer]
            shapes = [(num_rows, column.row_bytes) for column in part.spec.columns]
            if [values.shape for values in columns] != shapes or any(values.dtype != np.uint8 for values in columns):
                found = ", ".join(f"{values.dtype} {list(values.shape)}" for values in columns)
                needed = ", ".join(f"uint8 {list(shape)}" for shape in shapes)
                raise StageError(f"{self._label}: {part.spec} was captured as {found}, not as {needed}.", _DEFECT)
        return [by_name[part.spec.site, part.spec.layer] for part in self.parts]

    def admit(self, micro_batch: MicroBatch, token_rows: npt.NDArray[Any]) -> EncodedColumns:
        """Check the order, extend the digest, and encode the token columns. Raises StageError where rows would not ascend."""
        if self.is_complete or micro_batch.index != self._next_index:
            expected = "nothing more" if self.is_complete else self._next_index
            raise StageError(f"{self._label}: micro-batch {micro_batch.index} came, expected was {expected}.", _DEFECT)
        sequence_ids = np.concatenate([[self._last_sequence_id], micro_batch.sequence_ids])
        if (np.diff(sequence_ids) <= 0).any() or (micro_batch.token_counts <= 0).any():
            raise StageError(f"{self._label}: the sequences of micro-batch {micro_batch.index} do not ascend, or one is empty.", _DEFECT)
        self.digest.update(token_rows.view(np.uint8).data)
        self._next_index += 1
        self._last_sequence_id = int(sequence_ids[-1])
        self.is_complete = micro_batch.is_last
        return encode_tokens(token_rows)
