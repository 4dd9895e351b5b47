"""Columns inside of columns, by dotted names: the same rows from every format, and what is not there is said."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.logging import disable_progress_bar

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ROWS: list[dict[str, Any]] = [
    {"meta": {"id": "a", "n": 1}, "conversation": {"messages": CHAT, "tools": TOOLS}, "doc": {"body": {"text": "one"}}},
    {"meta": {"id": "b", "n": 2}, "conversation": {"messages": CHAT, "tools": None}, "doc": {"body": {"text": "two"}}},
]
FORMATS = ["a.jsonl", "a.json", "a.parquet", "a.arrow", "saved"]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.name == "a.json":
        path.write_text(json.dumps(rows))
    elif path.name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name == "a.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        disable_progress_bar()
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def source(path: Path, **options: Any) -> PromptSource:
    return PromptSource.open(PromptOptions(str(path), 100, **options))


def rows_of(path: Path, **options: Any) -> list[PromptRow]:
    return list(source(path, **options).rows())


@pytest.mark.parametrize("name", FORMATS)
def test_a_dotted_name_reaches_into_objects(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, ROWS)
    assert [(row.row_id, row.text) for row in rows_of(path, text_column="doc.body.text", id_column="meta.id")] == [
        ("a", "one"),
        ("b", "two"),
    ]
    chats = rows_of(path, messages_column="conversation.messages", id_column="meta.n")
    assert [(row.row_id, row.messages, row.tools) for row in chats] == [("1", CHAT, TOOLS), ("2", CHAT, None)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_masks_beside_token_ids_count(tmp_path: Path, name: str) -> None:
    rows = [{"features": {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}}]
    assert [row.token_ids for row in rows_of(written(tmp_path / name, rows), input_ids_column="features.input_ids")] == [[5, 6]]


def test_what_goes_with_the_prompt_may_be_a_column_by_itself(tmp_path: Path) -> None:
    rows = [{"conversation": {"messages": CHAT}, "tools": TOOLS}]
    (row,) = rows_of(written(tmp_path / "a.jsonl", rows), messages_column="conversation.messages")
    assert row.tools == TOOLS


def test_tools_that_appear_late_in_a_file_are_not_lost(tmp_path: Path) -> None:
    rows = [{"conversation": {"messages": CHAT}}] * 1500 + [{"conversation": {"messages": CHAT, "tools": TOOLS}}]
    found = rows_of(written(tmp_path / "a.jsonl", rows), messages_column="conversation.messages")
    assert [row.tools for row in found[1499:]] == [None, TOOLS]


@pytest.mark.parametrize("name", FORMATS)
def test_an_absent_one_is_named_beside_what_is_there(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, ROWS)
    with pytest.raises(
        PromptsError,
        match=r"has no column 'doc.title'.*one of its columns: 'conversation', 'conversation.messages', .* 'doc', 'doc.body', 'meta', 'meta.id'",
    ):
        source(path, text_column="doc.title")
    with pytest.raises(PromptsError, match="has no column 'meta.id.x'"):
        source(path, text_column="doc.body.text", id_column="meta.id.x")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, [{"doc.text": "flat", "doc": {"text": "nested", "x": 1}}])
    assert [row.text for row in rows_of(path, text_column="doc.text")] == ["flat"]


def test_a_row_without_the_object_is_quarantined(tmp_path: Path) -> None:
    rows = [{"doc": {"text": "one"}}, {"doc": None}, {"doc": "text"}, {"doc": {}}]
    reasons = [row.reason for row in rows_of(written(tmp_path / "a.jsonl", rows), text_column="doc.text")]
    assert reasons == [None, *["no column 'doc.text'"] * 3]
    table = pa.Table.from_pylist([{"doc": {"text": "one"}}, {"doc": None}, {"doc": {"text": None}}])
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.reason for row in rows_of(tmp_path / "a.parquet", text_column="doc.text")] == [None, "null", "null"]


def test_only_that_field_of_a_struct_is_read_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"doc": [{"other": "x" * 1000, "text": "one"}]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4 : data.index(b"x" * 1000)] = bytes(data.index(b"x" * 1000) - 4)  # the other field's page has no header any more
    path.write_bytes(data)
    assert [row.text for row in rows_of(path, text_column="doc.text")] == ["one"]
    with pytest.raises(PromptsError, match="is damaged"):
        rows_of(path, text_column="doc.other")


def test_of_many_files_that_lack_the_same_one_is_named(tmp_path: Path) -> None:
    for number in range(9):
        written(tmp_path / f"{number}-a.jsonl", ROWS)
    (tmp_path / "9.jsonl").write_text(json.dumps({"body": "one"}) + "\n")
    with pytest.raises(
        PromptsError, match=r"(?s)^2 problems.*0-a.jsonl has neither .* So it is with 8 more files\..*'doc.body'.*9.jsonl"
    ) as caught:
        source(tmp_path)
    assert "1-a.jsonl" not in str(caught.value)
