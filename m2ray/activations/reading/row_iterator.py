"""RowIterator: a layer's rows in random order as bare tensors, for trainers that take an iterator of [B, d]: SAELens, dictionary_learning."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from m2ray.activations.reading.stream import ActivationStream
from m2ray.errors import ConfigError

if TYPE_CHECKING:
    from m2ray.activations.reading.windows import Batch


class RowIterator(Iterator[torch.Tensor]):
    """Batches of a stream's activations, [B, W], epoch after epoch, each in an order of its own.

    Of a number of epochs every row comes once an epoch, so the last batch of one may be smaller. Without end (`epochs=None`) all batches are
    full: the few rows that fill none at the end of an epoch are left out of it, others each time.
    """

    def __init__(self, stream: ActivationStream, batch_rows: int, epochs: int | None, dtype: torch.dtype | None) -> None:
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs = {epochs} is not at least 1.", "None goes on without end.")
        self._stream = stream
        self._batch_rows = batch_rows
        self._epochs = epochs
        self._dtype = dtype
        self._epoch = 0
        self._has_given = False
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        """The next batch.

        Raises:
            ConfigError: without end, and the rows do not fill a single batch.
            RunDamagedError: a file is not what its commit says.
            NotInRunError: as ActivationStream does.
        """
        while self._epochs is None or self._epoch < self._epochs:
            if self._batches is None:
                self._batches = iter(self._stream)
            for batch in self._batches:
                rows = batch["activations"]
                if self._epochs is None and len(rows) < self._batch_rows:
                    continue
                self._has_given = True
                return rows if self._dtype is None else rows.to(self._dtype)
            if not self._has_given and self._epochs is None:
                raise ConfigError(
                    f"This consumer has fewer rows than one batch of {self._batch_rows}.", "Give a smaller `rows`, or more data."
                )
            self._epoch, self._has_given, self._batches = self._epoch + 1, False, None
            self._stream.set_epoch(self._epoch)
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ConfigError if it was taken of another run or layer, or with other options."""
        self._stream.load_state_dict(state)
        self._epoch, self._has_given, self._batches = int(state["epoch"]), state["rows_given"] > 0, None
