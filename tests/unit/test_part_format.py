"""Parts as files: at a real width and many pages, other libraries read them, and what they say of themselves is true."""

import zlib
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2ray import __version__
from m2ray.activations.reading.pages import PartPages
from m2ray.activations.schema import encode_tokens, part_schema
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import TOKEN_ROW, Bits, PartSpec
from m2ray.parquet.column_chunks import rows_of_page
from m2ray.parquet.pages import read_tail
from m2ray.parquet.structs import FILE_META_DATA, MAGIC, OFFSET_INDEX, PAGE_HEADER, PLAIN
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

SPEC = PartSpec.of("residual", 7, "bfloat16", 3072)
GROUP_ROWS = (1500, 700, 1)
COLUMNS = {"none": ["activation"], "planes": ["activation_hi", "activation_lo"]}


def token_rows(first_sequence: int, num_rows: int) -> np.ndarray:
    rows = np.empty(num_rows, TOKEN_ROW)
    rows["sequence_id"] = first_sequence + np.arange(num_rows) // 100
    rows["position"] = np.arange(num_rows) % 100
    rows["token_id"] = np.random.default_rng(first_sequence).integers(0, 200_000, num_rows)
    return rows


TOKENS = [token_rows(1000 * number, num_rows) for number, num_rows in enumerate(GROUP_ROWS)]
ROWS = [np.random.default_rng(number).integers(0, 256, (num_rows, 6144), dtype=np.uint8) for number, num_rows in enumerate(GROUP_ROWS)]


@pytest.fixture(scope="module", params=["none", "planes"])
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its path and compression."""
    store = LocalStore(tmp_path_factory.mktemp("part"))
    writer = PartWriter(store, SPEC, {"run_id": "r"}, 0, "a1", request.param)
    for tokens, rows in zip(TOKENS, ROWS, strict=True):
        writer.append(encode_tokens(tokens), [rows])
    writer.seal()
    writer.finish("0")
    assert writer.receipt is not None
    return store.path(writer.receipt.key), request.param


def columns_of(rows: Bits, compression: str) -> list[Bits]:
    return [rows] if compression == "none" else [rows[:, 1::2], rows[:, 0::2]]


def by_pyarrow(path: Path, compression: str) -> pq.FileMetaData:
    """What pyarrow itself writes of the same table, read back."""
    schema = part_schema(SPEC, {"run_id": "r"}, 0, "a1", compression)
    codec = {"compression": {"activation_hi": "zstd"} if compression == "planes" else "none"}
    plain = {"use_dictionary": ["sequence_id", "token_id"], "column_encoding": {"position": "DELTA_BINARY_PACKED"}}
    with pq.ParquetWriter(path, schema, write_statistics=["sequence_id", "position"], write_page_index=True, **codec, **plain) as writer:
        for tokens, rows in zip(TOKENS, ROWS, strict=True):
            arrays = [pa.array(np.ascontiguousarray(tokens[name])) for name in TOKEN_ROW.names]
            arrays += [pa.array([row.tobytes() for row in each], pa.binary(each.shape[1])) for each in columns_of(rows, compression)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(rows))
    return pq.read_metadata(path)


def test_every_library_gives_the_rows(part: tuple[Path, str]) -> None:
    path, compression = part
    names = [*TOKEN_ROW.names, *COLUMNS[compression]]
    tokens = np.concatenate(TOKENS)
    bodies = [each.tobytes() for each in columns_of(np.concatenate(ROWS), compression)]
    table = pq.read_table(path, partitioning=None)
    frame = pl.read_parquet(path, hive_partitioning=False)
    duck = duckdb.sql(f"select {', '.join(names)} from read_parquet('{path}', hive_partitioning = false)").arrow().read_all()
    for found in (table, frame.to_arrow(), duck):
        assert list(found.column_names) == names
        for name in TOKEN_ROW.names:
            assert np.array_equal(found[name].to_numpy(), tokens[name])
        for name, body in zip(COLUMNS[compression], bodies, strict=True):
            assert b"".join(found[name].to_pylist()) == body


def test_engines_skip_by_statistics_and_page_index(part: tuple[Path, str]) -> None:
    path, compression = part
    wanted = ROWS[1][TOKENS[1]["sequence_id"] == 1003]
    name = COLUMNS[compression][0]
    expected = columns_of(wanted, compression)[0].tobytes()
    found = pl.scan_parquet(path, hive_partitioning=False).filter(pl.col("sequence_id") == 1003).collect()
    assert b"".join(found[name]) == expected
    found = duckdb.sql(f"select {name} from read_parquet('{path}', hive_partitioning = false) where sequence_id = 1003 order by position")
    assert b"".join(row[0] for row in found.fetchall()) == expected
    metadata = pq.read_metadata(path)
    extremes = [metadata.row_group(number).column(0).statistics for number in range(3)]
    assert [(each.min, each.max) for each in extremes] == [(0, 14), (1000, 1006), (2000, 2000)]


def test_the_footer_says_what_pyarrows_would(part: tuple[Path, str], tmp_path: Path) -> None:
    path, compression = part
    ours, theirs = pq.read_metadata(path), by_pyarrow(tmp_path / "theirs.parquet", compression)
    assert ours.schema.equals(theirs.schema)
    assert ours.schema.to_arrow_schema().equals(theirs.schema.to_arrow_schema(), check_metadata=True)
    assert ours.metadata == theirs.metadata
    assert (ours.num_rows, ours.num_row_groups, ours.format_version) == (theirs.num_rows, theirs.num_row_groups, theirs.format_version)
    assert ours.created_by == f"m2ray version {__version__}"
    for number in range(ours.num_row_groups):
        our_group, their_group = ours.row_group(number), theirs.row_group(number)
        assert our_group.num_rows == their_group.num_rows
        for column in range(our_group.num_columns):
            our_chunk, their_chunk = our_group.column(column), their_group.column(column)
            for fact in ("path_in_schema", "physical_type", "num_values", "compression", "statistics", "has_dictionary_page"):
                assert getattr(our_chunk, fact) == getattr(their_chunk, fact), fact
            assert (our_chunk.has_offset_index, our_chunk.has_column_index) == (their_chunk.has_offset_index, their_chunk.has_column_index)


def test_pages_lie_where_the_index_says_and_hold_the_rows_themselves(part: tuple[Path, str]) -> None:
    path, compression = part
    data = path.read_bytes()
    footer, _ = FILE_META_DATA.read(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    assert (data[:4], data[-4:]) == (MAGIC, MAGIC)
    end = 4
    for group, rows in zip(footer["row_groups"], ROWS, strict=True):
        assert group["file_offset"] == end
        for column in group["columns"]:
            meta_data = column["meta_data"]
            index, stop = OFFSET_INDEX.read(data, column["offset_index_offset"])
            assert stop == column["offset_index_offset"] + column["offset_index_length"]
            pages, at = index["page_locations"], meta_data.get("dictionary_page_offset", meta_data["data_page_offset"])
            assert at == end
            end += meta_data["total_compressed_size"]
            assert pages[0]["offset"] == meta_data["data_page_offset"]
            assert pages[-1]["offset"] + pages[-1]["compressed_page_size"] == end
            name = meta_data["path_in_schema"][0].decode()
            if name in COLUMNS[compression]:
                values = columns_of(rows, compression)[COLUMNS[compression].index(name)]
                check_pages(data, pages, values, is_plain=name != "activation_hi")
        assert group["total_compressed_size"] == end - group["file_offset"]


def check_pages(data: bytes, pages: list[dict], values: Bits, *, is_plain: bool) -> None:
    assert len(pages) == -(-len(values) // rows_of_page(values.shape[1]))
    assert rows_of_page(values.shape[1]) <= 64
    first_rows = [page["first_row_index"] for page in pages]
    for page, first, last in zip(pages, first_rows, [*first_rows[1:], len(values)], strict=True):
        header, body = PAGE_HEADER.read(data, page["offset"])
        stop = page["offset"] + page["compressed_page_size"]
        assert body + header["compressed_page_size"] == stop
        assert header["crc"] % (1 << 32) == zlib.crc32(data[body:stop])
        assert header["uncompressed_page_size"] == (last - first) * values.shape[1]
        assert (header["data_page_header"]["num_values"], header["data_page_header"]["encoding"]) == (last - first, PLAIN)
        if is_plain:
            assert data[body:stop] == values[first:last].tobytes()


def test_any_rows_are_found_across_pages_and_row_groups(part: tuple[Path, str]) -> None:
    path, compression = part
    store, rows = LocalStore(path.parent), np.concatenate(ROWS)
    pages = PartPages(
        store,
        path.name,
        path.stat().st_size,
        read_tail(store, path.name, path.stat().st_size),
        SPEC,
        compression,
        check=True,
    )
    page_rows = rows_of_page(6144 if compression == "none" else 3072)
    for start, stop in ((0, len(rows)), (page_rows - 1, page_rows + 1), (1499, 1501), (2199, 2201), (2200, 2201)):
        assert np.array_equal(runs.span(pages, start, stop, 6144), rows[start:stop])
    for numbers in (np.array([0, page_rows, 1499, 1500, 2200]), np.sort(np.random.default_rng(0).choice(len(rows), 300, replace=False))):
        out = np.zeros((len(numbers), 6144), np.uint8)
        for start, stop in pages.pieces(numbers):
            pages.take(numbers[start:stop], out, np.arange(start, stop))
        assert np.array_equal(out, rows[numbers])


def test_rows_that_lie_apart_in_memory_are_written_alike(tmp_path: Path) -> None:
    """A capture may be a slice of something wider."""
    store, wide = LocalStore(tmp_path), np.random.default_rng(0).integers(0, 256, (50, 400), dtype=np.uint8)
    for compression in ("none", "planes"):
        receipts = []
        for attempt, rows in (("a1", wide[:, 100:300]), ("a2", np.ascontiguousarray(wide[:, 100:300]))):
            writer = PartWriter(store, PartSpec.of("mlp", 0, "float16", 100), {}, 0, f"{attempt}{compression}", compression)
            writer.append(encode_tokens(token_rows(0, 50)), [rows])
            writer.seal()
            writer.finish("0")
            receipts.append(writer.receipt)
        first, second = (pq.read_table(store.path(receipt.key), partitioning=None) for receipt in receipts if receipt)
        assert first.equals(second)
