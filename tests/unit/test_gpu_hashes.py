"""Hashing on a GPU, but for its kernel, which is held against xxhash on the GPU itself (tests/gpu): numpy stands for it."""

from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from m2ray.model import gpu_hashes
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range
from m2ray.model.gpu_hashes import GpuHashes, fits
from tests.hashed_by_numpy import HostHashes

CPU = torch.device("cpu")


def piece(offset: int, num_bytes: int) -> Range:
    return Range("f", offset, num_bytes, torch.uint8, (num_bytes,))


def test_digests_are_those_of_xxhash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pieces that end anywhere in a block, in several buffers that begin anywhere in a file."""
    monkeypatch.setattr(gpu_hashes, "_kernel", HostHashes)
    sizes = (248, 256, 1024, 1032, 1088, 4096, 70_008)
    file = np.random.default_rng(0).integers(0, 256, 16 + sum(sizes), dtype=np.uint8)
    pieces = [piece(offset, size) for offset, size in zip(np.cumsum((16, *sizes[:-1])).tolist(), sizes, strict=True)]
    hashes, digests = GpuHashes(CPU), WeightDigests({}, 0)
    first, second = hashes.add(pieces[:3], 8), hashes.add(pieces[3:], pieces[3].offset)
    hashes.settle()
    hashes.begin(torch.from_numpy(file[pieces[3].offset :]), second)
    hashes.begin(torch.from_numpy(file[8:]), first)
    hashes.finish(digests)
    for each in pieces:
        assert digests.of(each) == xxhash.xxh3_128_digest(file[each.offset : each.stop].tobytes())


def test_pieces_that_were_not_asked_for_have_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hashes, "_kernel", HostHashes)
    hashes, digests = GpuHashes(CPU), WeightDigests({}, 0)
    hashes.add([piece(0, 256)], 0)
    hashes.settle()
    hashes.finish(digests)
    with pytest.raises(KeyError):
        digests.of(piece(0, 256))


@pytest.mark.parametrize(("offset", "num_bytes", "does"), [(8, 248, True), (8, 240, False), (4, 256, False), (8, 252, False)])
def test_short_pieces_and_those_that_are_not_whole_words_are_left_to_readers(offset: int, num_bytes: int, does: bool) -> None:  # noqa: FBT001
    assert fits(piece(offset, num_bytes)) == does


def test_a_kernel_with_other_digests_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(HostHashes):
        def run(self, *given: Any) -> None:
            super().run(*given)
            given[4][0, 0] += 1

    monkeypatch.setattr(gpu_hashes, "_kernel", HostHashes)
    assert not gpu_hashes._difference(CPU)
    monkeypatch.setattr(gpu_hashes, "_kernel", Wrong)
    assert "248 bytes" in gpu_hashes._difference(CPU)
