"""Weights hashed where they go: xxh3-128 of what lies in a GPU's buffers, the digests that `xxhash` gives, without a core's time.

A core reads 2 to 3 GB/s out of the page cache, and hashing what it has read takes it a fifth as long again; a GPU that is being filled has
nothing else to do. Its kernel takes a piece's bytes into xxh3's accumulators; what is left to do with these eight numbers is done here.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range
from m2ray.model.kernel_proof import is_proved

Words = npt.NDArray[np.uint64]

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364ea"
    "c5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_BEGINNING = (_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0])


def _secret(at: int, count: int) -> Words:
    """So many words of xxh3's secret from byte `at` on."""
    return np.frombuffer(_SECRET, "<u8", count, at)


WORDS = np.concatenate([_secret(0, 24), _secret(121, 8), np.array(_BEGINNING, np.uint64)])
"""What the kernel needs of xxh3: the secret; what of it goes with a piece's last stripe; and the accumulators before the first."""

_SHORT_BYTES = 240
"""Pieces up to this size are hashed otherwise."""


def fits(piece: Range) -> bool:
    """Whether the kernel can hash a piece: in whole words, that lie in memory as words do."""
    return piece.num_bytes > _SHORT_BYTES and piece.num_bytes % 8 == 0 and piece.offset % 8 == 0


class GpuHashes:
    """Pieces that lie in buffers on a GPU, and their digests once these were asked for and the GPU is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: list[Range] = []
        self._places: list[tuple[int, int]] = []
        self._begun: list[slice] = []

    def add(self, pieces: Iterable[Range], base: int) -> slice:
        """Add pieces, which `fits` takes, and which will lie in one buffer that begins at byte `base` of their file. Returns their numbers."""
        first = len(self._pieces)
        self._pieces += pieces
        self._places += [(piece.offset - base, piece.num_bytes) for piece in self._pieces[first:]]
        return slice(first, len(self._pieces))

    def settle(self) -> None:
        """Copy what the kernel has to know to the GPU."""
        if self._pieces:
            self._table = torch.tensor(self._places, dtype=torch.int64).to(self._device)
            self._found = torch.empty((len(self._pieces), 8), dtype=torch.int64, device=self._device)
            self._words = torch.from_numpy(WORDS.view(np.int64)).to(self._device)

    def begin(self, data: torch.Tensor, pieces: slice) -> None:
        """Begin to hash these pieces, which lie in `data`, uint8, on the current stream. Any thread may."""
        if pieces.stop > pieces.start:
            _kernel()[pieces.stop - pieces.start,](self._table, data, self._words, self._found, pieces.start, num_warps=1)
            self._begun.append(pieces)

    def finish(self, digests: WeightDigests) -> None:
        """Hand on the digests of all pieces that were begun. The GPU has to be done with them."""
        if not self._begun:
            return
        found, sizes = self._found.cpu().numpy().view(np.uint64), np.array(self._places, np.uint64)[:, 1]
        ready = finished(found, sizes)
        for each in self._begun:
            for piece, digest in zip(self._pieces[each], ready[each], strict=True):
                digests.put(piece, digest)
        self._begun.clear()


def finished(accumulators_N8: Words, sizes_N: Words) -> list[bytes]:
    """The digests, 16 bytes each, of pieces of so many bytes, from what their stripes have come to."""
    low_N = _merged(accumulators_N8, _secret(11, 8), sizes_N * np.uint64(_PRIME64[0]))
    high_N = _merged(accumulators_N8, _secret(117, 8), ~(sizes_N * np.uint64(_PRIME64[1])))
    return [digest.tobytes() for digest in np.stack([high_N, low_N], axis=1).astype(">u8")]


def _merged(accumulators_N8: Words, secret_8: Words, beginning_N: Words) -> Words:
    keyed_N8 = accumulators_N8 ^ secret_8
    folded_N4 = _folded(keyed_N8[:, 0::2], keyed_N8[:, 1::2])
    total_N: Words = beginning_N + folded_N4.sum(axis=1, dtype=np.uint64)
    total_N = (total_N ^ (total_N >> np.uint64(37))) * np.uint64(0x165667919E3779F9)
    avalanched_N: Words = total_N ^ (total_N >> np.uint64(32))
    return avalanched_N


def _folded(one: Words, other: Words) -> Words:
    """The upper and the lower half of the products, 128 bits, of words, by exclusive or."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    one_low, one_high, other_low, other_high = one & mask, one >> half, other & mask, other >> half
    low = one_low * other_low
    middle = one_high * other_low + (low >> half)
    crossed = one_low * other_high + (middle & mask)
    folded: Words = (one_high * other_high + (middle >> half) + (crossed >> half)) ^ (one * other)
    return folded


# -- proof ----------------------------------------------------------------------------------------------------------------


@cache
def can_hash(device: torch.device) -> bool:
    """Whether there is a kernel for this device, and it has the digests of `xxhash`. Where there is none, the threads that read hash."""
    return is_proved(device, "Weights are hashed", _difference)


def _difference(device: torch.device) -> str:
    """What is wrong with the digests of pieces that end in a block, at its end, and at that of a stripe; "" if nothing."""
    sizes = (248, 256, 320, 1024, 1032, 1088, 4096, 66_560, 70_008)
    data = np.random.default_rng(0).integers(0, 256, 8 + sum(sizes), dtype=np.uint8)
    starts = np.cumsum((8, *sizes[:-1])).tolist()
    pieces = [Range("", start, size, torch.uint8, (size,)) for start, size in zip(starts, sizes, strict=True)]
    hashes, digests = GpuHashes(device), WeightDigests({}, 0)
    numbers = hashes.add(pieces, 0)
    hashes.settle()
    hashes.begin(torch.from_numpy(data).to(device), numbers)
    hashes.finish(digests)
    for piece in pieces:
        if digests.of(piece) != xxhash.xxh3_128_digest(data[piece.offset : piece.stop].data):
            return f"the digest of {piece.num_bytes} bytes is not that of xxhash"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.hash_kernel import accumulate

    return accumulate
