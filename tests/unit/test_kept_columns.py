"""Columns of the prompts that travel into `sequences/`: their types, rows that do not fit, and what is refused."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError, PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, PromptTokenizer, survey
from m2ray.sequences import read_sequences
from m2ray.storage import LocalStore
from tests.reference import DATA

TEXTS = ["one", "two words", "", "four is fine"]


def kept(path: Path, *names: str, **options: Any) -> pa.Table:
    """What `sequences/` has of these columns, beside id and reason."""
    chosen = PromptOptions(str(path), 1000, keep_columns=names, **options)
    store = LocalStore(path.parent / f"run-{path.name}")
    found = survey(PromptSource.open(chosen), PromptTokenizer.load(str(DATA / "prompts" / "tokenizer"), chosen, 320), store, "a", 1000)
    found.tokens.close()
    table = pa.concat_tables(read_sequences(store, file) for file in found.sequence_files)
    assert table.column_names[-len(names) :] == list(names), "behind m2ray's own"
    return table.select(["sequence_id", "reason", *names])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_types_of_a_file_with_a_schema_are_kept_and_quarantined_rows_keep_their_values(tmp_path: Path) -> None:
    began = datetime(2026, 2, 28, 12, tzinfo=UTC)
    columns = {
        "text": TEXTS,
        "label": pa.array(["a", "b", "c", None]).dictionary_encode(),
        "small": pa.array([1, 2, None, 4], pa.int8()),
        "score": pa.array([0.5, 1.5, 2.5, 3.5], pa.float32()),
        "at": pa.array([began] * 4, pa.timestamp("us", "UTC")),
        "spans": pa.array([[1, 2], [], None, [3]], pa.list_(pa.int16())),
        "of": pa.array([{"site": "x", "year": number} for number in range(4)]),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    table = kept(path, "label", "small", "score", "at", "spans", "of.year", "text")
    assert [str(field.type) for field in table.schema][2:] == [
        *("string", "int8", "float", "timestamp[us, tz=UTC]", "list<element: int16>", "int64", "string")
    ]
    assert table["reason"].to_pylist() == [None, None, "empty", None]
    assert table["label"].to_pylist() == ["a", "b", "c", None]
    assert table["small"].to_pylist() == [1, 2, None, 4]
    assert table["at"].to_pylist() == [began] * 4
    assert table["spans"].to_pylist() == [[1, 2], [], None, [3]]
    assert table["of.year"].to_pylist() == [0, 1, 2, 3]
    assert table["text"].to_pylist() == TEXTS


def test_types_of_json_are_those_of_its_first_rows_and_what_is_of_another_is_quarantined(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a text", "label": number, "score": number or None} for number in range(1001)]
    rows[3] |= {"score": 0.25}
    rows[4] = {"text": "no label"}
    rows.append({"text": "late", "label": "seven"})
    table = kept(write_lines(tmp_path / "a.jsonl", rows), "label", "score")
    assert [str(field.type) for field in table.schema][2:] == ["int64", "double"]
    assert table["reason"].drop_null().to_pylist() == ["label: 'seven' is not int64, as those of the column are"]
    assert table.slice(1001)["label"].to_pylist() == [None]
    assert table["label"].to_pylist()[:6] == [0, 1, 2, 3, None, 5]
    assert table["score"].to_pylist()[:4] == [None, 1.0, 2.0, 0.25]


def test_a_value_that_its_column_would_cut_quarantines_its_row(tmp_path: Path) -> None:
    first: list[dict[str, Any]] = [{"text": "a", "label": 1, "of": {"a": 1}, "ids": [1], "late": None}] * 1000
    rows = [*first, *({"text": "b", **late} for late in ({"label": 1.5}, {"label": True}, {"of": {"a": 1, "b": 2}}, {"ids": [1, 2.5]}))]
    rows += [{"text": "b", "label": 2.0, "of": {}, "ids": []}, {"text": "b", "late": "a label"}]
    table = kept(write_lines(tmp_path / "a.jsonl", rows), "label", "of", "ids", "late")
    assert table["reason"].drop_null().to_pylist() == [
        "label: 1.5 is not int64, as those of the column are",
        "label: True is not int64, as those of the column are",
        "of: {'a': 1, 'b': 2} is not struct<a: int64>, as those of the column are",
        "ids: [1, 2.5] is not list<item: int64>, as those of the column are",
    ]
    assert table.slice(1000)["label"].to_pylist() == [None, None, None, None, 2, None]
    assert table.slice(1004)["late"].to_pylist() == [None, "a label"], "the first value of a column without any in its first rows"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([10**8, 1], pa.date32()), "date32"),
        (pa.array([2**62, 1], pa.timestamp("us")), "timestamp"),
        (pa.array([2**50, 1], pa.duration("s")), "duration"),
    ],
)
def test_a_time_that_python_has_not_quarantines_its_row(tmp_path: Path, column: pa.Array, said: str) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "at": column}), tmp_path / "a.parquet")
    table = kept(tmp_path / "a.parquet", "at")
    assert re.match(rf"a value of {said}.* that Python cannot hold", table["reason"][0].as_py())
    assert table["at"].combine_chunks()[1].value == 1


@pytest.mark.parametrize(
    "column",
    [pa.array([1], pa.time64("ns")), pa.array([(1, 2, 3)], pa.month_day_nano_interval()), pa.array([{}], pa.struct([]))],
    ids=lambda column: str(column.type),
)
def test_a_type_that_would_be_cut_or_that_parquet_has_not_is_refused(tmp_path: Path, column: pa.Array) -> None:
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.schema({"text": pa.string(), "at": column.type})) as out,
    ):
        out.write_table(pa.table({"text": ["one"], "at": column}))
    with pytest.raises(PromptsError, match=r"keep_columns: 'at' of .* cannot be kept: it is of the type"):
        kept(tmp_path / "a.arrow", "at")


def test_what_a_csv_holds_is_text(tmp_path: Path) -> None:
    pa.csv.write_csv(pa.table({"text": TEXTS, "label": [1, 2, 3, 4]}), tmp_path / "a.csv")
    assert kept(tmp_path / "a.csv", "label")["label"].to_pylist() == ["1", "2", "3", "4"]


def test_files_of_a_folder_agree_or_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["one"], "label": pa.array([1], pa.int8())}), folder / "a.parquet")
    write_lines(folder / "b.jsonl", [{"text": "two", "label": 2**40}])
    table = kept(folder, "label")
    assert (str(table["label"].type), table["label"].to_pylist()) == ("int64", [1, 2**40])
    write_lines(folder / "c.jsonl", [{"text": "three", "label": "c"}])
    with pytest.raises(PromptsError, match=r"keep_columns: 'label' of .*c\.jsonl cannot be kept: .*int64.*string") as refused:
        kept(folder, "label")
    assert "one type in all files" in refused.value.remedy


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("status",), "'status' is a column that m2ray writes itself"),
        (("label", "label"), "names 'label' twice"),
        (("absent",), "has no column 'absent'. Set keep_columns to one of its columns: 'label', 'mixed', 'text'"),
        (("mixed",), "The values of 'mixed' in .*a.jsonl have no type in common"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_read(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one", "label": 1, "mixed": 1}, {"text": "two", "label": 2, "mixed": "x"}])
    with pytest.raises(PromptsError, match=said):
        kept(path, *names)


def test_a_flag_names_several_and_packed_prompts_none() -> None:
    given = {"model": "m", "prompts": "p", "output": "o"}
    assert ExtractConfig.validated({**given, "keep_columns": "label, topic"}).keep_columns == ("label", "topic")
    assert ExtractConfig.validated({**given, "keep_columns": ["label"]}).keep_columns == ("label",)
    with pytest.raises(ConfigError, match="pack = 64 joins prompts"):
        ExtractConfig.validated({**given, "keep_columns": "label", "pack": 64})
    with pytest.raises(ConfigError, match="keep_columns"):
        ExtractConfig.validated({**given, "keep_columns": []})
