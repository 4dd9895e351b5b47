"""Prompt sources: every format gives the same rows, one bad row costs only itself, an unreadable file stops the run."""

import csv
import gzip
import io
import json
import os
import re
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.logging import disable_progress_bar

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource
from m2ray.prompts.fingerprint import Fingerprint
from m2ray.prompts.rows import MAX_PROMPT_BYTES

TEXTS = ["The river is low.", 'He said: "cross, now"', "河水带走一切", "two\nlines", "  spaces kept  "]


def open_source(path, **options):
    return PromptSource.open(PromptOptions(str(path), max_length=100, **options))


def rows_of(path, **options):
    return list(open_source(path, **options).rows())


def reasons(path, **options):
    return {row.sequence_id: row.reason for row in rows_of(path, **options) if row.reason is not None}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def zstd(data):
    """Compressed as the tool does it, in two frames: such files may be put together from several."""
    half = len(data) // 2
    return b"".join(pa.compress(piece, "zstd", asbytes=True) for piece in (data[:half], data[half:]))


def write_format(path, texts, ids):
    """The same rows in the format that the name ends in."""
    table = {"id": ids, "text": texts, "other": list(range(len(texts)))}
    buffer = io.StringIO(newline="")
    objects = [{"id": name, "text": text} for name, text in zip(ids, texts, strict=True)]
    if ".csv" in path.name.lower():
        csv.writer(buffer).writerows([table.keys(), *zip(*table.values(), strict=True)])
    elif ".tsv" in path.name:
        csv.writer(buffer, delimiter="\t").writerows([table.keys(), *zip(*table.values(), strict=True)])
    elif ".jsonl" in path.name or ".ndjson" in path.name or path.name.startswith("lines.json"):
        buffer.writelines(json.dumps(one) + "\n" for one in objects)
    elif ".json" in path.name:
        json.dump(objects, buffer, ensure_ascii=False, indent=1 if path.name.startswith("pretty") else None)
    if path.name == "saved":
        datasets.Dataset.from_dict(table).save_to_disk(path, num_shards=2)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(table), path, row_group_size=2)
    elif path.suffix == ".arrow":
        open_arrow = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
        with open_arrow(path, pa.table(table).schema) as writer:
            writer.write_table(pa.table(table), max_chunksize=2)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(buffer.getvalue().encode()))
    elif path.suffix == ".zst":
        path.write_bytes(zstd(buffer.getvalue().encode()))
    else:
        path.write_bytes(buffer.getvalue().encode())
    return path


@pytest.fixture(autouse=True)
def _quiet_datasets():
    disable_progress_bar()


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.CSV", "a.csv.gz", "a.csv.zst", "a.tsv", "a.tsv.gz"),
        *("a.json", "pretty.json", "lines.json", "a.json.gz", "lines.json.gz", "a.json.zst"),
        *("a.parquet", "stream.arrow", "file.arrow", "saved"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    write_format(path, TEXTS, [f"id-{text[:3]}" for text in TEXTS])
    rows = rows_of(path, id_column="id")
    assert [row.text for row in rows] == TEXTS
    assert [row.row_id for row in rows] == [f"id-{text[:3]}" for text in TEXTS]
    assert [row.sequence_id for row in rows] == list(range(len(TEXTS)))
    assert [row.row_id for row in rows_of(path)] == [str(place) for place in range(len(TEXTS))]


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.zst", zstd)])
def test_plain_text_is_a_prompt_a_line_and_empty_lines_keep_their_number(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(b"\xef\xbb\xbffirst\r\n\n  \nbad \xff byte\n\xe6\xb2\xb3 last"))
    rows = rows_of(path)
    assert [(row.text, row.reason) for row in rows] == [
        ("first", None),
        (None, "empty"),
        (None, "empty"),
        (None, "invalid UTF-8 at byte 4 of its line"),
        ("河 last", None),
    ]
    (tmp_path / name).write_bytes(pack(b"first\nlast\n"))
    assert len(rows_of(path)) == 2  # the end of the last line begins no row


def test_bad_jsonl_rows_are_quarantined_one_by_one(tmp_path):
    lines = [
        b'{"id": "good", "text": "fine"}',
        b'{"id": 7, "text": "  \\n"}',
        b'{"id": "null", "text": null}',
        b'{"id": "number", "text": 12}',
        b'{"id": "list", "text": ["a"]}',
        b'{"id": "other", "body": "x"}',
        b'{"id": "broken", "text": "x',
        b'["a list"]',
        b"",
        b'{"id": "latin", "text": "caf\xe9"}',
        b'{"id": "\\ud800", "text": "\\ud800"}',
        b"[" * 100_000,
        b'{"id": "good", "text": "a duplicate id is allowed"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = rows_of(path, id_column="id")
    assert [row.sequence_id for row in rows] == list(range(len(lines)))
    assert [row.text for row in rows if row.reason is None] == ["fine", "a duplicate id is allowed"]
    found = {(row.row_id, row.reason) for row in rows if row.reason is not None}
    malformed = {reason for name, reason in found if name == "6"}
    assert found - {("6", reason) for reason in malformed} == {
        ("7", "empty"),
        ("null", "null"),
        ("number", "not a string but int"),
        ("list", "not a string but list"),
        ("other", "no column 'text'"),
        ("7", "not a JSON object but list"),
        ("8", "empty"),
        ("latin", "invalid UTF-8 at byte 28 of its line"),
        ("\\ud800", "invalid Unicode: a lone surrogate at character 0"),
        ("11", "malformed JSON: nested too deeply"),
    }
    assert malformed.pop().startswith("malformed JSON: Unterminated string starting at (character 25")


def test_bad_csv_rows_are_quarantined_one_by_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\na,fine\nb,"two\nlines \xff"\nc,an unquoted, comma\nd\n\nf,\ng,"still, fine"\n')
    rows = rows_of(path, id_column="id")
    assert [(row.sequence_id, row.text) for row in rows if row.reason is None] == [(0, "fine"), (6, "still, fine")]
    found = {row.sequence_id: (row.row_id, row.reason) for row in rows if row.reason is not None}
    assert found == {
        1: ("b", "invalid UTF-8 at byte 6 of its line"),
        2: ("2", "3 values under a header of 2"),
        3: ("3", "1 values under a header of 2"),
        4: ("4", "empty"),
        5: ("f", "empty"),
    }


@pytest.mark.parametrize(
    "row",
    [
        pytest.param('"first "bad" quote\nsecond line of it"\nok', id="closed-early"),
        pytest.param('"never closed\nok', id="never-closed"),
        pytest.param(f'"{"x" * (MAX_PROMPT_BYTES + 9)}\nthe rest of it"\nok', id="cut-with-its-quote"),
        pytest.param(f'"{f"{chr(10)}x" * (MAX_PROMPT_BYTES // 2 + 2)}"\nok', id="long-value-of-many-lines"),
    ],
)
def test_a_wrong_quote_in_csv_ends_the_survey_rather_than_make_prompts_of_a_values_rest(tmp_path, row):
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"two\nlines"\n{row}\n')
    with pytest.raises(
        PromptsError, match=rf"Row 1 of {re.escape(str(path))}, which begins in line 4, is malformed CSV: .* JSONL or Parquet"
    ):
        rows_of(path)


def test_bad_utf8_in_parquet_costs_only_its_row(tmp_path):
    offsets, data = pa.array([0, 2, 4, 6], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfeok")
    bad_strings = pa.StringArray.from_buffers(3, offsets, data)
    pq.write_table(pa.table({"text": bad_strings, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", id_column="id")
    assert [(row.row_id, row.text, row.reason) for row in rows] == [
        ("1", "ok", None),
        ("2", None, "invalid UTF-8 at byte 0"),
        ("3", "ok", None),
    ]


def test_rows_of_other_types_in_parquet_are_quarantined(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"bytes", None], pa.binary())}), tmp_path / "a.parquet")
    assert reasons(tmp_path / "a.parquet") == {0: "not a string but bytes", 1: "null"}


def test_a_row_beyond_the_size_limit_costs_only_itself(tmp_path):
    huge = "x" * (MAX_PROMPT_BYTES + 1)
    (tmp_path / "a.txt").write_text(f"before\n{huge}{huge}\nafter\n")
    assert [row.text for row in rows_of(tmp_path / "a.txt")] == ["before", None, "after"]
    pq.write_table(pa.table({"text": ["before", huge]}), tmp_path / "a.parquet")
    assert reasons(tmp_path / "a.parquet") == {1: f"{MAX_PROMPT_BYTES + 1} bytes, more than {MAX_PROMPT_BYTES}"}
    (tmp_path / "a.csv").write_text(f"text\nbefore\n{'x' * 200_000}\n{huge}\nafter\n")
    rows = rows_of(tmp_path / "a.csv")
    assert [len(row.text or "") for row in rows] == [6, 200_000, 0, 5]


GOOD_CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved", "a.csv"])
def test_messages_of_every_format(tmp_path, name):
    path = tmp_path / name
    chats = [GOOD_CHAT, [{"role": "system", "content": "s", "name": "n"}]]
    if name == "a.jsonl":
        write_jsonl(path, [{"chat": chat} for chat in chats])
    elif name == "a.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["chat"], *([json.dumps(chat)] for chat in chats)])
    elif name == "saved":
        padded = [[{"name": None, **message} for message in chat] for chat in chats]
        datasets.Dataset.from_dict({"chat": padded}).save_to_disk(path)
    else:
        pq.write_table(pa.table({"chat": [[{"name": None, **message} for message in chat] for chat in chats]}), path)
    source = open_source(path, messages_column="chat")
    assert source.columns.is_messages
    assert [row.messages for row in source.rows()] == chats


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "null"),
        ("hi", "messages are neither a list nor a list in JSON"),
        ({"role": "user", "content": "hi"}, "messages are not a list but dict"),
        ([], "empty"),
        ([{"role": "user", "content": " "}], "empty"),
        (["hi"], "message 0: not an object with role and content but str"),
        ([*GOOD_CHAT, {"content": "hi"}], "message 2: no 'role'"),
        ([{"role": "user"}], "message 0: no 'content'"),
        ([{"role": "user", "content": None}], "message 0: 'content' is not a string but NoneType"),
        ([{"role": "assistant", "tool_calls": []}], "message 0: no 'content'"),
        ([{"role": 3, "content": "hi"}], "message 0: 'role' is not a string but int"),
        ([{"role": "", "content": "hi"}], "message 0: 'role' is empty"),
        ([{"role": "user", "content": "\ud800"}], "invalid Unicode: a lone surrogate"),
    ],
)
def test_malformed_messages_are_quarantined(tmp_path, messages, reason):
    rows = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": GOOD_CHAT}, {"messages": messages}]))
    assert rows[0].reason is None
    assert rows[1].reason is not None
    assert rows[1].reason.startswith(reason)


MIXED = [{"messages": GOOD_CHAT}, {"text": "stray"}]


def test_two_columns_are_an_error_unless_one_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*[MIXED[0]] * 999, MIXED[1]])
    with pytest.raises(PromptsError, match=r"'text' \(first in row 999 of a.jsonl\) and 'messages' \(first in row 0 of a.jsonl\)"):
        open_source(path)
    assert [row.reason for row in rows_of(path, messages_column="messages")] == [None] * 999 + ["no column 'messages'"]
    assert rows_of(path, text_column="text")[999].text == "stray"
    with pytest.raises(PromptsError, match="text_column = 'text' and messages_column = 'messages' are both given"):
        open_source(path, text_column="text", messages_column="messages")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_the_named_one_of_two_columns_in_a_row_counts(tmp_path, name):
    path = tmp_path / name
    if name == "a.jsonl":
        write_jsonl(path, [{"text": "doc-title", "messages": GOOD_CHAT}])
    elif name == "a.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "messages"], ["doc-title", json.dumps(GOOD_CHAT)]])
    else:
        pq.write_table(pa.table({"text": ["doc-title"], "messages": [GOOD_CHAT]}), path)
    with pytest.raises(PromptsError, match="The prompts have several columns"):
        open_source(path)
    assert rows_of(path, messages_column="messages")[0].messages == GOOD_CHAT
    assert rows_of(path, text_column="text")[0].text == "doc-title"


def test_a_stray_row_deep_in_a_file_stops_the_survey(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*[{"text": "x"}] * 1500, {"messages": GOOD_CHAT}, {"text": "x"}])
    with pytest.raises(
        PromptsError, match=r"Row 1500 of .*a.jsonl has a column 'messages', but the rows before it have their prompts in 'text'"
    ):
        rows_of(path)
    assert [row.reason for row in rows_of(path, text_column="text")][1499:] == [None, "no column 'text'", None]


def test_all_files_give_their_prompts_by_one_column(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": GOOD_CHAT}])
    (tmp_path / "b.txt").write_text("a line\n")
    with pytest.raises(PromptsError, match=r"'text' \(the lines of b.txt\) and 'messages' \(first in row 0 of a.jsonl\)"):
        open_source(tmp_path)
    with pytest.raises(PromptsError, match="b.txt is plain text and has no column 'messages'. Leave messages_column out, or the file"):
        open_source(tmp_path, messages_column="messages")
    write_jsonl(tmp_path / "a.jsonl", [{"body": "another"}])
    assert [row.text for row in rows_of(tmp_path, text_column="body")] == ["another", "a line"]


def test_tools_are_of_no_use_to_texts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "tools": []}])
    assert rows_of(path)[0].text == "x"
    with pytest.raises(PromptsError, match='tools_column = "tools", add_generation_prompt = true is given, but the prompts are no chat'):
        open_source(path, tools_column="tools", add_generation_prompt=True)


def test_a_folder_is_read_in_the_order_of_its_paths_and_numbered_through(tmp_path):
    folder = tmp_path / "prompts"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_text("c\n")
    write_jsonl(folder / "a.jsonl", [{"text": "a0"}, {"text": ""}])
    write_format(folder / "b" / "z.parquet", ["b0"], ["x"])
    (folder / "_SUCCESS").write_text("")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a.jsonl").write_text('{"text": "hidden"}\n')
    (folder / ".hidden.bin").write_text("")
    source = open_source(folder)
    assert source.names == ("a.jsonl", "b/z.parquet", "c.txt")
    assert [(row.sequence_id, row.text) for row in source.rows()] == [(0, "a0"), (1, None), (2, "b0"), (3, "c")]
    assert open_source(folder / "**" / "[az].*").names == ("a.jsonl", "b/z.parquet")
    assert open_source(f"file://{folder}").names == source.names


def test_a_relative_glob_is_resolved_where_m2ray_runs(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "[b].txt").write_text("b\n")
    monkeypatch.chdir(tmp_path)
    assert open_source("*.txt").names == ("[b].txt", "a.txt")
    assert [row.text for row in open_source("[b].txt").rows()] == ["b"]  # a file of that very name comes before the pattern


def test_links_are_followed_and_a_link_to_nothing_is_named(tmp_path):
    for name in ("elsewhere/deep/x.txt", "prompts/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "prompts" / "linked").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "prompts", tmp_path / "prompts" / "**" / "*.txt"):
        assert open_source(path).names == ("linked/deep/x.txt", "y.txt")
    (tmp_path / "prompts" / "z.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(PromptsError, match=r"z\.txt"):
        open_source(tmp_path / "prompts").fingerprint()


def test_links_that_lead_round_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "prompts" / "deep").mkdir(parents=True)
    (tmp_path / "prompts" / "y.txt").write_text("y\n")
    (tmp_path / "prompts" / "deep" / "again").symlink_to(tmp_path / "prompts")
    with pytest.raises(PromptsError, match=r"deep/again .*round in a circle.*Remove the link"):
        open_source(tmp_path / "prompts")


def test_a_glob_gives_files_part_by_part_and_looks_no_deeper_than_it_says(tmp_path, monkeypatch):
    for name in ("a-b/1.txt", "a/2.txt", "a/deep/3.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: walked.append(str(folder)) or scandir(folder))
    assert open_source(tmp_path / "*" / "*.txt").names == ("a/2.txt", "a-b/1.txt")
    assert str(tmp_path / "a" / "deep") not in walked
    walked.clear()
    assert open_source(tmp_path / "*.txt").names == ("b.txt",)
    assert walked == [str(tmp_path)]


def test_a_shuffled_saved_dataset_keeps_its_own_order(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [f"t{place}" for place in range(3000)]}).shuffle(seed=3)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert [row.text for row in rows_of(tmp_path / "saved")] == dataset["text"]


def test_a_dataset_dict_is_refused_and_names_its_splits(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "saved")
    with pytest.raises(PromptsError, match=r'several splits: test, train. Name one: split = "test"'):
        open_source(tmp_path / "saved")
    assert len(rows_of(tmp_path / "saved" / "train")) == len(rows_of(tmp_path / "saved", split="train")) == 1
    with pytest.raises(PromptsError, match=r"no split 'dev'. Set split to one of: test, train"):
        open_source(tmp_path / "saved", split="dev")


def test_a_saved_dataset_without_one_of_its_files_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(PromptsError, match="lacks its file data-00001-of-00002.arrow"):
        open_source(tmp_path / "saved")


def write_cut(path, data):
    path.write_bytes(data[: len(data) // 2])


def test_sources_that_cannot_be_read_stop_the_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.yaml").write_text("{}")
    (tmp_path / "noext").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not parquet")
    write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])
    (tmp_path / "a.csv").write_text("body,title\n1,2\n")
    (tmp_path / "twice.csv").write_text("text,text\n1,2\n")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    twice = pa.table([["1"], ["2"]], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pa.ipc.new_stream(tmp_path / "twice" / "a.arrow", twice.schema) as stream:
        stream.write_table(twice)
    (tmp_path / "a.txt").write_text("x\n")
    cases = {
        "absent.jsonl": "absent.jsonl are absent",
        "*.nothing": "No file matches",
        "empty": "holds no files",
        "a.yaml": "a.yaml is unknown. m2ray reads .json, .jsonl",
        "noext": "noext is unknown",
        "broken.parquet": "broken.parquet is damaged",
        "a.jsonl": "neither a column 'text' nor 'messages' nor 'conversations' nor 'input_ids'. Set text_column, messages_column or input_ids_column to one of its columns: 'body', 'title'",
        "a.csv": "to one of its columns: 'body', 'title'",
        "twice.csv": "twice.csv names 'text' more than once",
        "twice.parquet": "twice.parquet names 'text' more than once",
        "twice": "a.arrow names 'text' more than once",
        "a.parquet": "to one of its columns: 'body'",
    }
    for name, message in cases.items():
        with pytest.raises(PromptsError) as caught:
            open_source(tmp_path / name)
        assert message in str(caught.value), name
    with pytest.raises(PromptsError, match="has no column 'key'"):
        open_source(tmp_path / "a.txt", id_column="key")
    with pytest.raises(PromptsError, match=r"has no column 'key'. Set id_column to one of its columns: 'body', 'title'"):
        open_source(tmp_path / "a.csv", id_column="key", text_column="body")
    with pytest.raises(PromptsError, match="scheme is 'ftp'"):
        open_source("ftp://host/prompts.jsonl")
    for name in ("owner/name", "hf://datasets/owner/name"):
        with pytest.raises(PromptsError, match="hf download OWNER/NAME --repo-type dataset"):
            open_source(name)
    with pytest.raises(PromptsError, match=r"absent.jsonl are absent. Check the path; every node that runs m2ray's driver must see it\.$"):
        open_source(tmp_path / "absent.jsonl")


def test_all_problems_of_a_folder_are_listed_at_once(tmp_path):
    (tmp_path / "a.csv").write_text("body\n1\n")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(PromptsError, match=r"(?s)2 problems.*b\.parquet is damaged.*a\.csv has neither"):
        open_source(tmp_path)


def test_a_file_cut_short_stops_the_run_by_name(tmp_path):
    texts = [os.urandom(40).hex() for _ in range(2000)]
    write_format(tmp_path / "whole.parquet", texts, texts)
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    data[200:2000] = bytes(1800)
    (tmp_path / "a.parquet").write_bytes(data)
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    write_cut(tmp_path / "a.jsonl.gz", gzip.compress(lines))
    write_cut(tmp_path / "a.jsonl.zst", pa.compress(lines, "zstd", asbytes=True))
    write_cut(tmp_path / "a.json", json.dumps([{"text": text} for text in texts]).encode())
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json"):
        with pytest.raises(PromptsError, match=name):
            rows_of(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_stops_the_run(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    path.chmod(0)
    with pytest.raises(PromptsError, match=r"a\.jsonl: Permission denied"):
        open_source(path)


def test_the_fingerprint_follows_names_order_and_bytes(tmp_path):
    def fingerprint(folder: Path, files: dict[str, str]) -> str:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return open_source(folder).fingerprint()

    first = fingerprint(tmp_path / "1", {"a.txt": "x\n", "b.txt": "y\n"})
    assert len(first) == 32
    assert fingerprint(tmp_path / "2", {"a.txt": "x\n", "b.txt": "y\n"}) == first
    others = [
        fingerprint(tmp_path / "3", {"a.txt": "x\n", "c.txt": "y\n"}),
        fingerprint(tmp_path / "4", {"a.txt": "y\n", "b.txt": "x\n"}),
        fingerprint(tmp_path / "5", {"a.txt": "x\ny\n", "b.txt": ""}),
        fingerprint(tmp_path / "6", {"a.txt": "x\n", "b.txt": "z\n"}),
        fingerprint(tmp_path / "7", {"a.txt": "x\nb.txty\n"}),
    ]
    assert len({first, *others}) == 6


def test_reading_holds_a_bounded_share_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for _ in range(4000):
            file.write(json.dumps({"text": "word " * 2000}) + "\n")
    source = open_source(path)
    tracemalloc.start()
    count = sum(1 for _ in source.rows())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak_bytes < 2 << 20 < path.stat().st_size // 10


def fingerprint_while_read(source: PromptSource, between=lambda: None) -> str:
    """Of the bytes that the rows came from. `between` is called once the first row is there."""
    seen = Fingerprint()
    for row in source.rows(seen):
        if row.sequence_id == 0:
            between()
    return seen.hexdigest()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.json", "a.csv", "a.csv.gz", "a.txt", "a.parquet", "file.arrow", "saved"]
)
def test_the_fingerprint_that_is_taken_while_reading_is_that_of_the_files(tmp_path, name):
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("one\ntwo")
    else:
        write_format(path, TEXTS, TEXTS)
    if name.endswith(".gz"):
        path.write_bytes(path.read_bytes() + bytes(2 << 20))  # padding, which gzip allows
    assert fingerprint_while_read(open_source(path)) == open_source(path).fingerprint()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"])
def test_a_limit_takes_the_first_rows_and_looks_at_no_file_behind_them(tmp_path, name):
    first = write_format(tmp_path / name, TEXTS, TEXTS) if name != "a.txt" else tmp_path / name
    if name == "a.txt":
        first.write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    behind = write_jsonl(tmp_path / "b.jsonl", [{"text": "behind"}])
    everything = rows_of(tmp_path)
    for limit in (1, 2, len(everything) - 1, len(everything), 99):
        source = open_source(tmp_path, limit=limit)
        assert list(source.rows()) == everything[:limit]
        assert fingerprint_while_read(source) == source.fingerprint(), limit
    whole, limited = open_source(tmp_path).fingerprint(), open_source(tmp_path, limit=2).fingerprint()
    assert limited == open_source(first).fingerprint(), "of the files that the rows are in"
    behind.write_text('{"text": "other"}\n')
    assert open_source(tmp_path, limit=2).fingerprint() == limited
    assert open_source(tmp_path).fingerprint() != whole


def test_a_file_that_is_replaced_while_it_is_read_leaves_the_fingerprint_of_what_was_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5000} for _ in range(1000)])
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "y" * 5000} for _ in range(1000)])
    source = open_source(path)
    before = source.fingerprint()
    assert fingerprint_while_read(source, lambda: other.replace(path)) == before != source.fingerprint()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_grows_or_is_overwritten_while_it_is_read_stops_the_survey(tmp_path, name):
    path = write_format(tmp_path / name, TEXTS, TEXTS)

    def change():
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END if name == "a.jsonl" else 4)
            file.write(b'{"text": "more"}\n')

    with pytest.raises(PromptsError, match=f"{name} (changed while it was read|is damaged)"):
        fingerprint_while_read(open_source(path), change)
