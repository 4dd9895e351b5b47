"""CaptureWriter: whatever takes what a stage captured. The writer of its rows is one, that of its statistics another."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from m2ray.activations.writing.backlog import Figures
from m2ray.batches import CapturedLayer, MicroBatch, PartReceipt


class CaptureWriter(Protocol):
    """One thread submits; any thread may collect or abandon."""

    def submit(self, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float) -> None:
        """Take what was captured of one micro-batch of an attempt, at all layers or some; at each layer they come in order.

        Raises StoreError or StageError: the attempt has failed.
        """

    def collect(self, shard: int, attempt: str, timeout_s: float) -> tuple[PartReceipt, ...]:
        """Make durable what came of a complete attempt, and give its receipts. Raises StoreError or StageError: nothing of it is left then."""

    def abandon(self, attempts: Iterable[tuple[int, str]], timeout_s: float) -> None:
        """Give up each (shard, attempt). One that is not open is left alone. Raises StoreError if something could not be deleted."""

    def close(self, timeout_s: float) -> None:
        """Give up all that is not collected. Raises StoreError as `abandon` does."""


class RowWriter(CaptureWriter, Protocol):
    """That of rows, in the stage's process or in one beside it."""

    @property
    def figures(self) -> Figures:
        """How far it is."""

    @property
    def threads(self) -> Sequence[ThreadPoolExecutor]:
        """Those of this process that a store which hangs keeps."""
