"""Kernels on more values, and at places further on, than 32 bits count."""

from collections.abc import Iterator

import pytest
import torch
import xxhash

from m2ray.model import fused_statistics, statistics
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.gpu_hashes import GpuHashes
from m2ray.model.quantization.fused import KernelTable
from m2ray.model.quantization.scaling import ScaledUnpack, dequantize
from m2ray.model.taking_rows import extremes_of, take_rows
from tests.reference import same_bits

GPU = torch.device("cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 << 30, reason="needs 40 GiB of a CUDA device"),
]
NUM_ROWS, WIDTH = 720_000, 3072
FAR = (9 << 29) + 8
"""A place beyond 4 GiB."""


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    assert NUM_ROWS * WIDTH > 2**31
    return torch.randn((NUM_ROWS, WIDTH), generator=torch.Generator(GPU).manual_seed(0), device=GPU, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _gives_memory_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def test_rows(rows: torch.Tensor) -> None:
    places = torch.arange(NUM_ROWS - 1, -1, -1, device=GPU)
    found_NW, found = take_rows(rows, places)
    assert torch.equal(found_NW, rows.flip(0))
    assert extremes_of(found.cpu()).tolist() == [float(rows.min()), float(rows.max())]


def test_statistics(rows: torch.Tensor) -> None:
    (mean_W, squares_W, *ends), _, _ = fused_statistics.moments(rows)
    (expected_mean_W, expected_squares_W, *expected_ends), _, _ = statistics._moments(rows)
    assert ((mean_W - expected_mean_W).abs() < 1e-6).all(), "of values of about 1"
    assert ((squares_W / expected_squares_W - 1).abs() < 1e-6).all()
    assert torch.equal(torch.stack(ends), torch.stack(expected_ends))
    assert torch.equal(fused_statistics.norms(rows), statistics._norms(rows))


def test_packed_weights_and_their_hashes() -> None:
    data = torch.zeros(5 << 30, dtype=torch.uint8, device=GPU)
    height, columns = 1536, 3072
    generator = torch.Generator(GPU).manual_seed(0)
    values = Range("f", FAR, height * columns, torch.float8_e4m3fn, (height, columns))
    scales = Range("f", values.stop, 12 * 24 * 4, torch.float32, (12, 24))
    values.of(data, 0).copy_(torch.randn((height, columns), generator=generator, device=GPU))
    scales.of(data, 0).copy_(torch.rand((12, 24), generator=generator, device=GPU))
    into = torch.empty((height, columns), dtype=torch.bfloat16, device=GPU)
    table = KernelTable()
    parts = {"values": values, "scale": scales}
    table.add(RowsToLoad("", parts, ScaledUnpack((128, 128)), into), {name: part.offset for name, part in parts.items()})
    table.to(GPU)
    table.run(data, slice(0, 1))
    assert same_bits(into, dequantize(values.of(data, 0), scales.of(data, 0), (128, 128)))
    hashes, digests = GpuHashes(GPU), WeightDigests({}, 0)
    whole = Range("f", 16, FAR, torch.uint8, (FAR,))
    numbers = hashes.add([values, whole], 0)
    hashes.settle()
    hashes.begin(data, numbers)
    hashes.finish(digests)
    for piece in (values, whole):
        assert digests.of(piece) == xxhash.xxh3_128_digest(data[piece.offset : piece.stop].cpu().numpy().data)
