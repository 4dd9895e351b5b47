"""A span's packed layers, read into the places where they live."""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import torch
import xxhash

from m2ray.batches import Residency
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import RowsToLoad
from m2ray.model.residency.bringing import Bringing
from m2ray.model.residency.node_memory import NodeMemory, Porter
from m2ray.model.residency.packed_layer import PackedLayer, Read, lay_out
from m2ray.model.residency.places import InCheckpoint, InHostMemory, OnDevice, Place, host_memory
from m2ray.model.residency.readers import PIECE_BYTES, Readers, Reading
from m2ray.model.skeleton import Skeleton
from m2ray.model.tensors import MatchedTensor


class PackedLayers:
    """Those of a span's layers that are not kept as they are computed with. Use as a context: leaving it by an error ends what reads."""

    def __init__(self, residency: Mapping[int, Residency], offload_folder: str, device: torch.device, shared: Collection[int] = ()) -> None:
        """Args:
        residency: of the span's layers; those that are "gpu", and those that it does not name, are none of these.
        offload_folder: where layers that are read from files are copied first; "" to read the model's own.
        shared: those in host memory that other processes of the node have there too.
        """
        self._residency = {number: where for number, where in residency.items() if where != "gpu"}
        self._folder = offload_folder
        self._device = device
        self._shared = shared
        self._porter = Porter()
        self._memories: dict[int, NodeMemory] = {}
        self._awaited: list[tuple[int, PackedLayer, NodeMemory, _Reader]] = []
        self._readers = Readers(device)
        self._layers: dict[int, tuple[PackedLayer, Place]] = {}
        self._reading: dict[int, list[Reading]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._readers.close()
            self._porter.close()

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
        packed, reader = lay_out(layer), _Reader(checkpoint, digests)
        if number not in self._shared:
            self._read(number, packed, self._place_of(number, packed, checkpoint), reader.load)
            return
        memory = NodeMemory(_name(packed, checkpoint), packed.num_bytes)
        self._porter.look_after(memory)
        if memory.is_ours:
            self._read_for_all(number, packed, memory, reader)
        else:
            self._awaited.append((number, packed, memory, reader))

    def _read(self, number: int, packed: PackedLayer, place: Place, step: Callable[[Place, Read], None]) -> None:
        self._layers[number] = packed, place
        self._reading[number] = [self._readers.submit(step, place, read) for read in packed.reads]

    def _read_for_all(self, number: int, packed: PackedLayer, memory: NodeMemory, reader: "_Reader") -> None:
        """Have a layer in memory that processes of the node have together: read by this one, or hashed as another one has read it."""
        on_gpu = self._device.type == "cuda"
        run = memory.map(writable=memory.is_ours or on_gpu)  # CUDA pins no other
        weakref.finalize(run, memory.leave).atexit = False
        place = InHostMemory(run, self._device) if on_gpu else OnDevice(run, self._readers)
        self._read(number, packed, place, reader.load if memory.is_ours else partial(reader.hash, run))
        self._memories[number] = memory

    def finish(self, on_read: Callable[[], None]) -> None:
        """Wait until all that was begun is in its place.

        Raises:
            StoreError: reading failed.
            StageError: writing to a disk did, or another process does not read what it reads for this one too.
        """
        self._wait_for_reading(on_read)
        for number, packed, memory, reader in self._awaited:  # whoever reads these may wait for what was read here
            memory.wait()
            self._read_for_all(number, packed, memory, reader)
            self._wait_for_reading(on_read)
        self._awaited.clear()

    def _wait_for_reading(self, on_read: Callable[[], None]) -> None:
        for number, reading in self._reading.items():
            for future in reading:
                future.result()
                on_read()
            self._layers[number][1].settle()
            if number in self._memories:
                self._memories[number].offer()
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
            return InHostMemory(host_memory(packed.num_bytes), self._device)
        place = OnDevice(torch.empty(packed.num_bytes, dtype=torch.uint8, device=self._device), self._readers)
        if on_gpu:
            torch.cuda.current_stream(self._device).synchronize()  # others write now into what may have been used on this stream
        return place


class _Reader(NamedTuple):
    """Where a layer's bytes are read, and where they are hashed."""

    checkpoint: Checkpoint
    digests: WeightDigests

    def load(self, place: Place, read: Read) -> None:
        """Read a run of a file's bytes, a piece at a time, hash it and have it kept."""

        def fetch(offset: int, out: memoryview) -> None:
            self.checkpoint.read_extent(read.file, offset, out)
            self.digests.add(read.parts, offset, out)

        for offset, at, num_bytes in read.pieces(PIECE_BYTES):
            place.keep(at, num_bytes, partial(fetch, offset))

    def hash(self, run: torch.Tensor, _: Place, read: Read) -> None:
        """Hash a run of a file's bytes that is in its place already. They count as read: whoever waits for this stage sees that it goes on."""
        for offset, at, num_bytes in read.pieces(PIECE_BYTES):
            self.digests.add(read.parts, offset, run[at : at + num_bytes].numpy().data)
            self.checkpoint.count(num_bytes)


def _name(layer: PackedLayer, checkpoint: Checkpoint) -> str:
    """Of a layer's run: another one for other bytes, and where they lie otherwise."""
    files = checkpoint.versions({read.file for read in layer.reads})
    runs = [(read.file, read.offset, read.stop, read.at) for read in layer.reads]
    return xxhash.xxh3_128_hexdigest(repr((checkpoint.url, sorted(files.items()), runs, layer.num_bytes)).encode())
