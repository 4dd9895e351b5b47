"""Planes and single rows: every bit pattern comes back, from any place, by our reader and by stock ones."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from m2ray.activations import planes
from m2ray.activations.reading.pages import PartPages
from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.activations.schema import encode_tokens, part_key
from m2ray.activations.writing.commits import claim_run
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import TOKEN_ROW, PartSpec
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError
from m2ray.parquet.pages import read_tail
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

RESIDUAL = runs.PARTS[1]
HALF = PartSpec.of("mlp", 7, "float16", 13)
ALL_BITS = np.arange(1 << 16, dtype="<u2")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A finished run whose shards were written with planes, without, and with planes."""
    folder = tmp_path_factory.mktemp("mixed")
    runs.finished_run(LocalStore(folder), [*runs.PARTS, HALF], ("planes", "none"))
    return folder


def expected(spec: PartSpec) -> np.ndarray:
    return np.concatenate([runs.bits(spec, i) for ids in runs.SHARD_SEQUENCES for i in ids])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def write_part(folder: Path, compression: str, spec: PartSpec, groups: list[np.ndarray]) -> PartPages:
    """A part of these row groups, as pages."""
    store = LocalStore(folder)
    writer = PartWriter(store, spec, {}, 0, "a1", compression)
    for rows in groups:
        tokens = np.zeros(len(rows), TOKEN_ROW)
        tokens["position"] = np.arange(len(rows))
        writer.append(encode_tokens(tokens), [rows])
    writer.seal()
    writer.finish("0")
    key, num_bytes = writer.receipt.key, writer.receipt.num_bytes
    return PartPages(store, key, num_bytes, read_tail(store, key, num_bytes), spec, compression, check=True)


@given(npst.arrays(np.uint16, st.tuples(st.integers(0, 5), st.integers(1, 9))))
def test_planes_lose_nothing(numbers: np.ndarray) -> None:
    rows = numbers.astype("<u2").view(np.uint8)
    assert np.array_equal(planes.high(rows), rows[:, 1::2])
    assert np.array_equal(planes.low(rows), rows[:, 0::2])
    assert np.array_equal(planes.join(planes.high(rows), planes.low(rows), np.empty_like(rows)), rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern_of_16_bits_comes_back_from_a_part_in_planes(tmp_path: Path, dtype: str) -> None:
    rows = ALL_BITS.reshape(-1, 64).view(np.uint8)
    pages = write_part(tmp_path, "planes", PartSpec.of("residual", 0, dtype, 64), [rows[:700], rows[700:]])
    assert np.array_equal(runs.span(pages, 0, 1024, rows.shape[1]), rows)


@pytest.mark.parametrize("compression", ["none", "planes"])
@settings(max_examples=40)
@given(data=st.data())
def test_any_span_of_many_pages_and_row_groups(tmp_path_factory, compression: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    width = data.draw(st.sampled_from([1, 40, 3000]))
    groups = [
        rng.integers(0, 256, (count, 2 * width), dtype=np.uint8)
        for count in data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    ]
    rows = np.concatenate(groups)
    pages = write_part(tmp_path_factory.mktemp("part"), compression, PartSpec.of("residual", 0, "bfloat16", width), groups)
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    for low, high in ((start, stop), (start, start + 1), (stop - 1, stop), (0, len(rows))):
        assert np.array_equal(runs.span(pages, low, high, rows.shape[1]), rows[low:high])


def test_the_reader_goes_by_each_parts_footer(mixed: Path) -> None:
    found = [pq.read_schema(mixed / part_key(RESIDUAL, shard, f"{0xA0 + shard:012x}")) for shard in range(3)]
    assert [schema.metadata[b"m2ray.compression"] for schema in found] == [b"planes", b"none", b"planes"]
    run = open_run(mixed)
    for spec in (*runs.PARTS, HALF):
        view = run.site(spec.site).layer(spec.layer)
        assert np.array_equal(bits_of(view.tensor()), expected(spec))
        for sequence_id in (4, 3, 8):
            assert np.array_equal(bits_of(view.sequence(sequence_id)), runs.bits(spec, sequence_id))
    assert verify(LocalStore(mixed), checksums=True).damages == ()


def test_stock_readers_open_planes(mixed: Path) -> None:
    path = mixed / part_key(RESIDUAL, 0, f"{0xA0:012x}")
    rows = np.concatenate([runs.bits(RESIDUAL, i) for i in runs.SHARD_SEQUENCES[0]])
    table = pq.read_table(path, partitioning=None)
    assert [str(table.schema.field(name).type) for name in ("activation_hi", "activation_lo")] == ["fixed_size_binary[24]"] * 2
    metadata = pq.read_metadata(path).row_group(0)
    assert [metadata.column(number).compression for number in (3, 4)] == ["ZSTD", "UNCOMPRESSED"]
    found = duckdb.sql(f"select activation_hi, activation_lo from '{path}'").fetchall()
    frame = pl.read_parquet(path, hive_partitioning=False)
    for high, low in (
        (table["activation_hi"].to_pylist(), table["activation_lo"].to_pylist()),
        zip(*found, strict=True),
        (frame["activation_hi"].to_list(), frame["activation_lo"].to_list()),
    ):
        assert b"".join(high) == rows[:, 1::2].tobytes()
        assert b"".join(low) == rows[:, 0::2].tobytes()


def test_an_unknown_compression_is_refused_and_float32_is_stored_as_it_is(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ConfigError, match="compression = 'zip' is unknown. It may be: none, planes"):
        runs.writer(store, runs.job(store, [RESIDUAL]), compression="zip")
    rows = np.random.default_rng(0).integers(0, 256, (5, 32), dtype=np.uint8)
    spec = PartSpec.of("residual", 0, "float32", 8)
    assert np.array_equal(runs.span(write_part(tmp_path, "planes", spec, [rows]), 0, 5, 32), rows)
    footer = pq.read_schema(tmp_path / part_key(spec, 0, "a1"))
    assert footer.names[3:] == ["activation"]
    assert footer.metadata[b"m2ray.compression"] == b"none"


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [RESIDUAL, HALF], ids=["residual", "mlp"])
def test_rows_in_any_order(mixed: Path, spec: PartSpec) -> None:
    view, rows = open_run(mixed).site(spec.site).layer(spec.layer), expected(spec)
    rng = np.random.default_rng(0)
    for indices in ([], [0], [66], [5, 5, 4], rng.permutation(67), rng.integers(0, 67, 500), torch.arange(67), range(20, 50)):
        found = view.rows(indices)
        assert found.dtype == getattr(torch, spec.columns[0].dtype)
        assert tuple(found.shape) == (len(indices), spec.columns[0].width)
        assert np.array_equal(bits_of(found), rows[np.asarray(indices, np.int64)])


@pytest.mark.parametrize("indices", [[67], [-1], [0, 1000]])
def test_rows_that_are_not_there(mixed: Path, indices: list[int]) -> None:
    with pytest.raises(NotInRunError, match="rows 0 to 66 are committed"):
        open_run(mixed).site("mlp").layer(7).rows(indices)
    with pytest.raises(NotInRunError, match=r"layers 0, 7, 11.*\.layer\(NUMBER\)"):
        open_run(mixed).site("residual").rows([0])


def test_a_damaged_page_index_is_refused_or_harmless(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = claim_run(store, runs.job(store, [RESIDUAL]))
    runs.commit_shard(run, runs.shard(0), "a1", "planes")
    path = tmp_path / part_key(RESIDUAL, 0, "a1")
    good = path.read_bytes()
    refused = 0
    for place in range(max(0, len(good) - 3000), len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            assert open_run(tmp_path).layer(7).rows([0, 24]).shape == (2, 24)
        except RunDamagedError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100
