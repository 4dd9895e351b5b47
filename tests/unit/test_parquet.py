"""Thrift's compact protocol and Parquet's structs: what pyarrow writes is read, and what is written pyarrow reads."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2ray.parquet.structs import FILE_META_DATA, MAGIC, OFFSET_INDEX
from m2ray.parquet.thrift import BINARY, BOOL, I16, I32, I64, List, Struct, Type

INNER = Struct(flag=(1, BOOL), text=(40, BINARY))
OUTER = Struct(small=(2, I16), number=(3, I32), large=(300, I64), inner=(301, INNER), numbers=(302, List(I64)), inners=(303, List(INNER)))


def values_of(type_: Type) -> st.SearchStrategy:
    if isinstance(type_, Struct):
        return st.fixed_dictionaries({}, optional={name: values_of(each) for name, (_, each) in type_.fields.items()})
    if isinstance(type_, List):
        return st.lists(values_of(type_.of), max_size=20)
    if type_ in (BOOL, BINARY):
        return st.booleans() if type_ == BOOL else st.binary(max_size=300)
    limit = {I16: 1 << 15, I32: 1 << 31, I64: 1 << 63}[type_]
    return st.integers(-limit, limit - 1)


@given(values_of(OUTER))
def test_what_is_written_is_read(values: dict) -> None:
    written = OUTER.write(values)
    assert OUTER.read(b"before" + written + b"after", 6) == (values, 6 + len(written))
    assert Struct().read(written) == ({}, len(written)), "fields of other numbers are passed over"
    for length in range(len(written)):
        with pytest.raises(ValueError, match="cut off"):
            OUTER.read(written[:length])


def test_other_types_than_expected_are_refused() -> None:
    for expected, found in (((1, I32), (1, I64)), ((1, BOOL), (1, I32)), ((1, List(I32)), (1, List(BINARY))), ((1, INNER), (1, BINARY))):
        value = {I64: 5, I32: 5, BINARY: b"x", List(BINARY): [b"x"]}[found[1]]
        with pytest.raises(ValueError, match="another type than it should"):
            Struct(a=expected).read(Struct(a=found).write({"a": value}))
    with pytest.raises(ValueError, match="without end"):
        Struct().read(b"\x1c" * 100_000)


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    table = pa.table({"a": list(range(1000)), "b": ["x"] * 1000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=300, write_page_index=True)
    return (tmp_path / "t.parquet").read_bytes()


def test_a_footer_of_pyarrows_is_read(file: bytes) -> None:
    footer, stop = FILE_META_DATA.read(file, len(file) - 8 - int.from_bytes(file[-8:-4], "little"))
    assert (stop, file[stop + 4 :]) == (len(file) - 8, MAGIC)
    assert footer["num_rows"] == 1000
    assert [group["num_rows"] for group in footer["row_groups"]] == [300, 300, 300, 100]
    columns = footer["row_groups"][0]["columns"]
    assert [column["meta_data"]["path_in_schema"] for column in columns] == [[b"a"], [b"b"]]
    assert (columns[0]["meta_data"]["statistics"]["min_value"], columns[0]["meta_data"]["statistics"]["is_min_value_exact"]) == (
        bytes(8),
        True,
    )
    index, _ = OFFSET_INDEX.read(file, columns[0]["offset_index_offset"])
    assert [page["first_row_index"] for page in index["page_locations"]] == [0]
    with pytest.raises(ValueError, match="cut off"):
        FILE_META_DATA.read(file[:-20], len(file) - 8 - int.from_bytes(file[-8:-4], "little"))


def test_pyarrow_reads_a_footer_that_is_written(file: bytes) -> None:
    begin = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    footer, _ = FILE_META_DATA.read(file, begin)
    footer["created_by"] = b"somebody else version 1.2.3"
    written = FILE_META_DATA.write(footer)
    again = file[:begin] + written + len(written).to_bytes(4, "little") + MAGIC
    assert pq.read_metadata(pa.BufferReader(again)).created_by == "somebody else version 1.2.3"
    assert pq.read_table(pa.BufferReader(again))["a"].to_pylist() == list(range(1000))
