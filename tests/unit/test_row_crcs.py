"""CRC32s of rows and of the pages that they make up, with numpy in the place of the kernel, which is held against isal on the GPU itself (tests/gpu)."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations.job import JobRecord
from m2ray.batches import CapturedLayer, MicroBatch, PartSpec
from m2ray.model import row_crcs as module
from m2ray.model.capture import Capture
from m2ray.model.eight_bits import Encoder
from m2ray.model.row_crcs import row_crcs
from m2ray.parquet.column_chunks import rows_of_page
from m2ray.parquet.crcs import crcs_of_pages
from m2ray.selection import Selection
from m2ray.sites import parts_of_run
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

CPU = torch.device("cpu")
WIDTH = 15_001
"""Of the tests' rows: 4 in a page of 16 bits, 8 in one of 8, of no whole words."""


class HostKernel:
    """What the kernel makes, row by row."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *given, **tile: self.run(grid[0], *given, **tile)

    def run(
        self, programs: int, units: torch.Tensor, masks: torch.Tensor, crcs: torch.Tensor, of_zeros: int, num_rows: int, num_words: int,
        row_units: int, **tile: int,
    ) -> None:  # fmt: skip
        assert tile["ROWS"] * (programs - 1) < num_rows <= tile["ROWS"] * programs
        assert units.shape == (num_rows, row_units)
        octets = np.zeros((num_rows, 4 * num_words), np.uint8)
        octets[:, : row_units * units.itemsize] = units.view(torch.uint8).numpy()
        for row, words in enumerate(octets.view(np.uint32)):
            parities = np.bitwise_count(np.bitwise_xor.reduce(words & masks.numpy().view(np.uint32), axis=1)) & 1
            crcs[row] = int(np.packbits(parities, bitorder="little").view(np.int32)[0]) ^ of_zeros


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_kernel", HostKernel)
    monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    yield
    module._distrusted.clear()


@pytest.mark.parametrize("unit_bytes", [1, 2, 4])
def test_a_kernel_is_held_against_zlib(unit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module._problem(unit_bytes, CPU)

    class LastProgram(HostKernel):
        def run(self, *given: Any, **tile: int) -> None:
            super().run(*given, **tile)
            given[3][-1] = 0

    class OneBit(HostKernel):
        """Takes the lowest bit of each word for another one of the last bit's."""

        def run(self, programs: int, units: torch.Tensor, masks: torch.Tensor, *given: Any, **tile: int) -> None:
            super().run(programs, units, masks ^ torch.tensor([0] * 31 + [1], dtype=torch.int32)[:, None], *given, **tile)

    for wrong in (LastProgram, OneBit):
        monkeypatch.setattr(module, "_kernel", wrong)
        assert "are not zlib's" in module._problem(unit_bytes, CPU)


@pytest.mark.parametrize("value_bytes", [1, 2, 3, 16, 37, 2048, 2049, 6144, 6145])
def test_pages_are_those_of_their_values(value_bytes: int) -> None:
    page_rows = rows_of_page(value_bytes)
    rows = np.random.default_rng(value_bytes).integers(0, 256, (3 * page_rows, value_bytes), dtype=np.uint8)
    crcs = np.array([zlib.crc32(row) for row in rows], np.uint32)
    assert row_crcs(torch.from_numpy(rows)).numpy().view(np.uint32).tolist() == crcs.tolist()
    for num_rows in {0, 1, page_rows - 1, page_rows, page_rows + 1, 3 * page_rows}:
        pages = [rows[first : min(num_rows, first + page_rows)] for first in range(0, num_rows, page_rows)]
        assert crcs_of_pages(crcs[:num_rows], value_bytes, page_rows).tolist() == [zlib.crc32(page.tobytes()) for page in pages]


def keeping(part: PartSpec, micro_batch: MicroBatch, *, with_crcs: bool) -> Capture:
    generator = torch.Generator().manual_seed(micro_batch.index)
    kept = Capture(micro_batch, [part], Selection(), Encoder(), None, with_crcs=with_crcs)
    kept.keep(part.site, part.layer, torch.randn(*micro_batch.token_ids_BT.shape, WIDTH, generator=generator).bfloat16())
    kept.end()
    return kept


def captured(part: PartSpec, micro_batch: MicroBatch, *, with_crcs: bool) -> tuple[CapturedLayer, ...]:
    return keeping(part, micro_batch, with_crcs=with_crcs).finish()


def written(folder: Path, record: JobRecord, *, with_crcs: bool) -> Path:
    """The part of one shard that is captured and written."""
    store, (part,), shard = LocalStore(folder), record.parts, runs.shard(0)
    writer = runs.writer(store, record, queue_bytes=4 << 20)
    try:
        for micro_batch in runs.micro_batches(shard):
            writer.submit("a1", micro_batch, captured(part, micro_batch, with_crcs=with_crcs), timeout_s=10)
        (receipt,) = writer.collect(shard.index, "a1", 10)
    finally:
        writer.close()
    return store.path(receipt.key)


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32", "float8", "int8"])
def test_a_part_is_the_same_whoever_makes_its_crcs(store_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = runs.job(LocalStore(tmp_path), parts_of_run({"residual": (3,)}, store_dtype, WIDTH))
    by_core = written(tmp_path / "core", record, with_crcs=False)
    monkeypatch.setattr("m2ray.parquet.column_chunks.crc32", lambda _: pytest.fail("a core was asked for a CRC32"))
    by_gpu = written(tmp_path / "gpu", record, with_crcs=True)
    assert by_gpu.read_bytes() == by_core.read_bytes()
    assert pq.ParquetFile(by_gpu, page_checksum_verification=True).read().num_rows == runs.shard(0).num_tokens


def test_after_a_wrong_one_the_writer_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong CRC32 would make right rows unreadable. Those on their way are dropped with it."""
    record = runs.job(LocalStore(tmp_path), parts_of_run({"residual": (3,)}, "bfloat16", WIDTH))
    by_core, micro_batch = written(tmp_path / "core", record, with_crcs=False), runs.micro_batches(runs.shard(0))[0]

    class Wrong(HostKernel):
        def run(self, *given: Any, **tile: int) -> None:
            super().run(*given, **tile)
            given[3].bitwise_xor_(1)

    on_its_way = keeping(record.parts[0], micro_batch, with_crcs=True)
    monkeypatch.setattr(module, "_kernel", Wrong)
    with pytest.warns(RuntimeWarning, match="computed without cpu of .* from now on, which takes longer: it has made a wrong one") as told:
        by_gpu = written(tmp_path / "gpu", record, with_crcs=True)
    assert len(told) == 1
    assert by_gpu.read_bytes() == by_core.read_bytes()
    assert on_its_way.finish()[0].crcs == ()


def test_without_a_kernel_or_where_nobody_asks_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (part,), micro_batch = parts_of_run({"residual": (3,)}, "float8", WIDTH), runs.micro_batches(runs.shard(0))[0]
    assert [each.shape for each in captured(part, micro_batch, with_crcs=True)[0].crcs] == [(15,), (15,)]
    assert captured(part, micro_batch, with_crcs=False)[0].crcs == ()
    monkeypatch.setattr(module, "has_kernel", lambda _, unit_bytes: unit_bytes == 4)
    assert captured(part, micro_batch, with_crcs=True)[0].crcs == (), "of its scales alone"
