"""A span's packed layers, read into the places where they live."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch

from m2ray.batches import Residency
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import RowsToLoad
from m2ray.model.residency.bringing import Bringing
from m2ray.model.residency.packed_layer import PackedLayer, Read, lay_out
from m2ray.model.residency.places import InCheckpoint, InHostMemory, OnDevice, Place
from m2ray.model.residency.readers import PIECE_BYTES, Readers, Reading
from m2ray.model.skeleton import Skeleton
from m2ray.model.tensors import MatchedTensor


class PackedLayers:
    """Those of a span's layers that are not kept as they are computed with. Use as a context: leaving it by an error ends what reads."""

    def __init__(self, residency: Mapping[int, Residency], offload_folder: str, device: torch.device) -> None:
        """Args:
        residency: of the span's layers; those that are "gpu", and those that it does not name, are none of these.
        offload_folder: where layers that are read from files are copied first; "" to read the model's own.
        """
        self._residency = {number: where for number, where in residency.items() if where != "gpu"}
        self._folder = offload_folder
        self._device = device
        self._readers = Readers(device)
        self._layers: dict[int, tuple[PackedLayer, Place]] = {}
        self._reading: dict[int, list[Reading]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._readers.close()

    def __contains__(self, number: object) -> bool:
        return number in self._residency

    def begin(
        self, number: int, layer: Iterable[tuple[MatchedTensor, Sequence[RowsToLoad]]], checkpoint: Checkpoint, digests: WeightDigests
    ) -> None:
        """Begin to read a layer into its place, and to hash it.

        Args:
            layer: its tensors, and the pieces that fill each, as views of a tensor without memory.

        Raises:
            StageError: a disk has no room for it.
        """
        packed = lay_out(layer)
        place = self._place_of(number, packed, checkpoint)
        self._layers[number] = packed, place
        self._reading[number] = [self._readers.submit(_load, place, checkpoint, digests, read) for read in packed.reads]

    def finish(self, on_read: Callable[[], None]) -> None:
        """Wait until all that was begun is in its place. Raises StoreError: reading failed; StageError: writing to a disk did."""
        for number, reading in self._reading.items():
            for future in reading:
                future.result()
                on_read()
            self._layers[number][1].settle()
        self._reading.clear()

    def bring(self, skeleton: Skeleton) -> None:
        """Have each layer, once all are loaded, brought and unpacked just before it runs."""
        if self._layers:
            Bringing(skeleton, self._layers, self._readers, self._device)
        if not any(isinstance(place, InCheckpoint) for _, place in self._layers.values()):
            self._readers.close()

    def _place_of(self, number: int, packed: PackedLayer, checkpoint: Checkpoint) -> Place:
        on_gpu = self._device.type == "cuda"
        if self._residency[number] == "checkpoint":
            return InCheckpoint(packed, checkpoint, self._folder, self._readers)
        if self._residency[number] == "host" and on_gpu:
            return InHostMemory(packed.num_bytes, self._device)
        place = OnDevice(packed.num_bytes, self._device, self._readers)
        if on_gpu:
            torch.cuda.current_stream(self._device).synchronize()  # others write now into what may have been used on this stream
        return place


def _load(place: Place, checkpoint: Checkpoint, digests: WeightDigests, read: Read) -> None:
    """Read a run of a file's bytes, a piece at a time, hash it and have it kept."""

    def fetch(offset: int, out: memoryview) -> None:
        checkpoint.read_extent(read.file, offset, out)
        digests.add(read.parts, offset, out)

    for offset, at, num_bytes in read.pieces(PIECE_BYTES):
        place.keep(at, num_bytes, partial(fetch, offset))
