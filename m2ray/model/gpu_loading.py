"""Loading at the disk's speed: long reads into pinned memory, one copy to the GPU, FP8 dequantised there by a fused kernel.

Checkpoint tensors that lie side by side in a file are read as one extent. Each lane owns a pinned buffer, a buffer on the GPU
and a stream, so that reading, copying and converting of different extents overlap; host memory holds an extent a lane and no more.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from m2ray.model.checkpoint import Checkpoint

LANES = min(16, 2 * (os.cpu_count() or 8))
"""One thread copies some 2 GB/s out of the page cache; the GPU takes 50."""

_ALIGNMENT = 16
EXTENT_BYTES = 16 * 2**20 - _ALIGNMENT
"""With room to align it a power of two: torch rounds pinned memory up to one."""

_MAX_GAP_BYTES = 4096


@dataclass(frozen=True)
class Wanted:
    """Some bytes of one checkpoint tensor: `num_bytes` from `offset` of `file`, and what to do with them once on the GPU."""

    file: str
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    arrive: Callable[[torch.Tensor], None]


@dataclass
class _Extent:
    """A run of wanted bytes of one file, read at once."""

    file: str
    start: int
    stop: int
    wanted: list[Wanted] = field(default_factory=list)


class _Lane:
    """One reader's buffers and stream."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        self.on_gpu = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.copied = torch.cuda.Event()

    def load(self, checkpoint: Checkpoint, extent: _Extent) -> None:
        """Read the extent, copy it, and hand each tensor of it to its `arrive`, on this lane's stream."""
        # Tensors keep their alignment to the file's own offsets, which safetensors aligns for their dtypes.
        lead = extent.start % _ALIGNMENT
        num_bytes = extent.stop - extent.start
        self.copied.synchronize()
        checkpoint.read_extent(extent.file, extent.start, self.pinned[lead : lead + num_bytes].numpy().data)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            self.on_gpu[: lead + num_bytes].copy_(self.pinned[: lead + num_bytes], non_blocking=True)
            self.copied.record(self.stream)
            # The small ones first: of a weight and its scale, the one that comes first has to be kept.
            for wanted in sorted(extent.wanted, key=lambda wanted: wanted.num_bytes):
                begin = lead + wanted.offset - extent.start
                wanted.arrive(self.on_gpu[begin : begin + wanted.num_bytes].view(wanted.dtype).view(wanted.shape))


class Kept:
    """A copy of something that arrived, for use on another lane: a lane's buffer is filled again at once."""

    def __init__(self, values: torch.Tensor) -> None:
        self._copy = values.clone()
        self._copied = torch.cuda.Event()
        self._copied.record()

    def tensor_here(self) -> torch.Tensor:
        """The copy, safe to use on the current stream."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._copied)
        self._copy.record_stream(stream)
        return self._copy


def load_extents(checkpoint: Checkpoint, wanted: Sequence[Wanted], device: torch.device, on_extent: Callable[[], None]) -> None:
    """Read all that is wanted. `arrive` runs on several threads, each within its own stream; this returns when the GPU is done.

    Raises:
        StoreError: reading fails.
    """
    extents = list(_extents(wanted))
    size_bytes = max((extent.stop - extent.start for extent in extents), default=0) + _ALIGNMENT
    lanes: list[_Lane] = []  # until the GPU is done: their buffers are in use after their threads have ended
    mine = threading.local()
    # What was allocated before must be there before other streams write into it.
    torch.cuda.synchronize(device)

    def load(extent: _Extent) -> None:
        if not hasattr(mine, "lane"):  # pinning memory is slow: one lane's is pinned while others read
            mine.lane = _Lane(size_bytes, device)
            lanes.append(mine.lane)
        mine.lane.load(checkpoint, extent)

    # A tensor that cannot be cut smaller takes the room of several lanes.
    num_lanes = max(1, min(LANES, LANES * (EXTENT_BYTES + _ALIGNMENT) // size_bytes))
    with ThreadPoolExecutor(num_lanes, thread_name_prefix="load") as pool:
        try:
            for _ in pool.map(load, extents):
                on_extent()
        finally:
            pool.shutdown(cancel_futures=True)
    torch.cuda.synchronize(device)


def _extents(wanted: Iterable[Wanted]) -> Iterator[_Extent]:
    """Neighbours in a file joined, up to EXTENT_BYTES; a tensor that is larger by itself stays one extent."""
    extent: _Extent | None = None
    for piece in sorted(wanted, key=lambda piece: (piece.file, piece.offset)):
        stop = piece.offset + piece.num_bytes
        is_neighbour = extent is not None and extent.file == piece.file and 0 <= piece.offset - extent.stop <= _MAX_GAP_BYTES
        if extent is not None and is_neighbour and stop - extent.start <= EXTENT_BYTES:
            extent.stop = stop
        else:
            if extent is not None:
                yield extent
            extent = _Extent(piece.file, piece.offset, stop)
        extent.wanted.append(piece)
    if extent is not None:
        yield extent


def dequantize_into(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], into: torch.Tensor) -> None:
    """`(weight.float() * scale).to(bfloat16)`, block by block, in one pass over memory: bitwise what `dequantize` gives.

    Args:
        weight: FP8 e4m3 [rows, columns], contiguous.
        scale: float32 [row blocks, column blocks], contiguous.
        block: rows and columns of a block.
        into: bfloat16 [rows, columns], each row contiguous.
    """
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    _kernel()[grid](weight, scale, into, rows, columns, into.stride(0), scale.shape[1], block[0], block[1])


def can_dequantize(weight: torch.Tensor, block: tuple[int, int] | None, into: torch.Tensor) -> bool:
    """Whether the fused kernel serves: Hopper's FP8 on a GPU that has it, blocks of powers of two, bfloat16 rows."""
    return (
        weight.dtype == torch.float8_e4m3fn
        and weight.dim() == 2
        and block is not None
        and all(side & (side - 1) == 0 for side in block)
        and into.device == weight.device
        and into.dtype == torch.bfloat16
        and into.stride(-1) == 1
        and _has_fp8(weight.device)
    )


@cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


_compiled: list[Any] = []


def _kernel() -> Any:
    if not _compiled:
        from m2ray.model.fp8_kernel import dequantize_block

        _compiled.append(dequantize_block)
    return _compiled[0]
