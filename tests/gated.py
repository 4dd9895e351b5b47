"""A writer whose store waits until it is told to go on: in a process of its own, which imports this file alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m2ray.activations.writing.writer import ActivationWriter, WriterSpec
from m2ray.batches import PartSpec
from m2ray.errors import StoreError
from m2ray.storage import Data, LocalStore, PartSink


@dataclass(frozen=True)
class Gated(WriterSpec):
    """Its store waits before each write to a part until `gate` is there, and refuses it if that says so."""

    gate: str = ""

    def open(self, parts: Sequence[PartSpec]) -> ActivationWriter:
        store = _GatedStore(Path(self.output))
        store.gate = Path(self.gate)
        return ActivationWriter(store, self.run_metadata, parts, queue_bytes=self.queue_bytes, threads=self.threads)


class _GatedStore(LocalStore):
    gate: Path

    def open_part(self, key: str) -> PartSink:
        return _GatedSink(super().open_part(key), self.gate)


class _GatedSink(PartSink):
    def __init__(self, sink: PartSink, gate: Path) -> None:
        self._sink, self._gate = sink, gate
        self.close, self.abort = sink.close, sink.abort  # type: ignore[method-assign]

    def write(self, data: Data) -> None:
        deadline = time.monotonic() + 20
        while not self._gate.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._gate.read_text():
            raise StoreError(f"Cannot write: {self._gate.read_text()}.", "The disk is full.")
        self._sink.write(data)

    def close(self) -> None: ...
    def abort(self) -> None: ...
