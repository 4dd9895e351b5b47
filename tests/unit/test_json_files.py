"""Files that end in .json: a list of objects element by element, or an object a line; what is neither is refused in a sentence."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource, json_files
from m2ray.prompts.rows import MAX_PROMPT_BYTES


def rows_of(path: Path, **options: Any) -> list[PromptRow]:
    return list(PromptSource.open(PromptOptions(str(path), 100, **options)).rows())


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


OBJECTS = [{"text": text} for text in ('He said: "[{,}]"', "back\\slash \\", "two\nlines", "河水 \U0001f642", "}{][,", '\\"')]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 1 << 18])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_a_list_is_cut_where_no_string_holds_the_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, form: dict[str, Any]
) -> None:
    monkeypatch.setattr(json_files, "_PIECE_BYTES", piece_bytes)
    path = written(tmp_path / "a.json", "\ufeff \n" + json.dumps(OBJECTS, **form) + "\n \n")
    assert [row.text for row in rows_of(path)] == [one["text"] for one in OBJECTS]


def test_a_wrong_element_costs_only_itself(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * (MAX_PROMPT_BYTES + 1)})
    elements = ['{"text": "a"}', "7", '["text"]', '{"text": }', '{"text": "b]"}', long, '{"text": "c"}', ""]
    path = written(tmp_path / "a.json", f"[{','.join(elements)}]")
    rows = rows_of(path)
    assert {row.sequence_id: row.text for row in rows if row.reason is None} == {0: "a", 4: "b]", 6: "c"}
    assert [row.reason for row in rows if row.reason is not None] == [
        "not a JSON object but int",
        "not a JSON object but list",
        "malformed JSON: Expecting value (character 9)",
        f"an element of more than {MAX_PROMPT_BYTES} bytes",
        "empty",
    ]
    latin = written(tmp_path / "latin.json", b'[{"text": "a"}, {"text": "caf\xe9"}, {"text": "b"}]')
    assert [row.reason for row in rows_of(latin)] == [None, "invalid UTF-8 at byte 14 of its element", None]


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "a.json", "[ ]")) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"text": "a"}, {"text": "b"', "is no list in JSON: it ends within element 1"),
        ('[{"text": "a}, {"text": "b"}]', "is no list in JSON: it ends within element 0"),
        ('[{"text": "a"}] [{"text": "b"}]', "is no list in JSON: something follows its end, after 1 elements"),
        ('[{"text": "a"}]]', "something follows its end"),
        ('{\n "data": [\n  {"text": "a"}\n ]\n}', r"is neither a list of objects nor an object a line.*give the list alone"),
        ('"text"', "is neither a list of objects nor an object a line"),
        ('{"data": [{"text": "a"}]}', "a.json has neither a column 'text'.*one of its columns: 'data'"),
    ],
)
def test_what_is_neither_a_list_nor_lines_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(PromptsError, match=why):
        rows_of(written(tmp_path / "a.json", text))


def test_a_list_is_read_in_bounded_memory(tmp_path: Path) -> None:
    one = json.dumps({"text": "word " * 2000})
    path = written(tmp_path / "a.json", f"[{','.join([one] * 3000)}]")
    tracemalloc.start()
    count = sum(1 for _ in PromptSource.open(PromptOptions(str(path), 100)).rows())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak_bytes < 4 << 20 < path.stat().st_size // 5


def test_a_string_that_never_ends_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b'[{"text": "' + b"x" * (40 << 20))
    tracemalloc.start()
    with pytest.raises(PromptsError, match="it ends within element 0"):
        rows_of(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12 << 20
