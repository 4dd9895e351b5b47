"""Prompts in memory give the rows that a file would, equal values give equal files, and what is no prompt is refused in words."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
import xxhash

from m2ray.errors import PromptsError, raise_all
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource
from m2ray.prompts.in_memory import as_file

TEXTS = ["The river is low.", "河水带走一切", "", "two\nlines", "  spaces kept  "]
CHATS = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "on", "thinking": "x"}]]
IDS = [[1, 2, 3], [4], [5, 6]]
LABELS = [0, 1, None, 3, 4]


def rows(prompts: Any, **options: Any) -> list[Any]:
    with as_file(prompts) as path:
        return list(PromptSource.open(PromptOptions(path, 100, **options)).rows())


def digest(prompts: Any) -> tuple[str, str]:
    with as_file(prompts) as path:
        return Path(path).name, xxhash.xxh3_128_hexdigest(Path(path).read_bytes())


def frames() -> list[Any]:
    columns = {"text": TEXTS, "label": LABELS}
    table = pa.table(columns)
    return [
        table,
        pa.concat_tables([table.slice(0, 2), table.slice(2)]),
        pa.concat_tables([table.slice(3), table, table.slice(0, 1)]).slice(2, 5),
        table.replace_schema_metadata({"who": "me"}),
        table.set_column(0, "text", table["text"].dictionary_encode()),
        pl.DataFrame(columns),
        pl.DataFrame({"text": pl.Series(TEXTS, dtype=pl.Categorical), "label": LABELS}),
        datasets.Dataset.from_dict(columns),
    ]


def test_a_path_is_itself() -> None:
    with as_file("s3://bucket/prompts.jsonl") as path, as_file(Path("a") / "b.txt") as other:
        assert (path, other) == ("s3://bucket/prompts.jsonl", "a/b.txt")


@pytest.mark.parametrize(
    "prompts",
    [
        *(TEXTS, tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS), pl.Series(TEXTS)),
        *(pa.array(TEXTS), pa.chunked_array([TEXTS[:1], TEXTS[1:]]), pd.Series(TEXTS, index=[7, 7, 1, 0, 2]).astype("category")),
    ],
    ids=lambda one: f"{type(one).__module__}.{type(one).__name__}",
)
def test_texts(prompts: Any) -> None:
    found = rows(prompts)
    assert [row.text for row in found] == ["The river is low.", "河水带走一切", None, "two\nlines", "  spaces kept  "]
    assert [row.reason for row in found] == [None, None, "empty", None, None]
    assert digest(prompts) == digest(TEXTS)


@pytest.mark.parametrize(
    "prompts",
    [
        *(["a", None, "b"], ["a", float("nan"), "b"], ["a", pd.NA, "b"], np.array(["a", np.nan, "b"], dtype=object)),
        *(
            pd.Series(["a", np.nan, "b"]),
            pd.Series(["a", None, "b"], dtype="string"),
            pl.Series(["a", None, "b"]),
            pa.array(["a", None, "b"]),
        ),
    ],
)
def test_what_is_missing_is_a_row_without_a_text(prompts: Any) -> None:
    assert [(row.text, row.reason) for row in rows(prompts)] == [("a", None), (None, "null"), ("b", None)]
    assert digest(prompts) == digest(["a", None, "b"])


def test_chats_keep_keys_that_others_have_not() -> None:
    assert [row.messages for row in rows(CHATS)] == CHATS


@pytest.mark.parametrize(
    "prompts", [IDS, [np.array(one) for one in IDS], [torch.tensor(one) for one in IDS]], ids=["lists", "numpy", "torch"]
)
def test_token_ids(prompts: Any) -> None:
    assert [row.token_ids for row in rows(prompts)] == IDS
    assert digest(prompts) == digest(IDS)
    assert [row.token_ids for row in rows(np.array([[1, 2], [3, 4]]))] == [[1, 2], [3, 4]]


def test_rows_of_dicts_have_columns() -> None:
    given = [{"text": text, "label": label, "id": f"r{number}"} for number, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))]
    found = rows(given, keep_columns=("label",), id_column="id")
    assert [row.kept for row in found] == [(label,) for label in LABELS]
    assert [row.row_id for row in found] == ["r0", "r1", "r2", "r3", "r4"]


@pytest.mark.parametrize(
    "frame",
    [*frames(), pd.DataFrame({"text": TEXTS, "label": LABELS}, index=[9, 8, 7, 6, 5]), pl.DataFrame({"text": TEXTS, "label": LABELS})],
)
def test_frames(frame: Any) -> None:
    found = rows(frame, keep_columns=("label",))
    assert [row.text for row in found] == ["The river is low.", "河水带走一切", None, "two\nlines", "  spaces kept  "]
    assert [row.kept for row in found] == [(label,) for label in LABELS]


def test_equal_tables_are_equal_files_however_they_lie_in_memory() -> None:
    assert len({digest(frame) for frame in frames()}) == 1
    long = pa.table({"text": [str(number) for number in range(3000)]})
    assert digest(long) == digest(pa.concat_tables([long.slice(0, 7), long.slice(7, 2000), long.slice(2007)]))
    assert digest(long) != digest(long.slice(1))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a", [1, 2]], r"prompts\[0\] is of texts, and prompts\[1\], \[1, 2\], is of token ids"),
        (CHATS[1], r"messages of one chat.*list of chats"),
        ([[1, "a"]], "neither messages nor token ids"),
        ([3.5], "A prompt is 3.5, of float"),
        ([], "hold no rows"),
        ("The capital of France is", r"taken for a path, .*Give a text as a list"),
        ("long " * 1000, r"taken for a path, .*Give a text as a list"),
        ([1, 2, 3], r"the token ids of one: 1 .*\[\[1, 2, 3\], \.\.\.\]"),
        (b"a text", "cannot be given as bytes"),
        ([b"a text"], "A prompt is b'a text', of bytes"),
        ([{"text": "a", 1: 2, "1": 3}], "A row has the key 1, of int"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), r"(?s)Duplicate column names.*a name of its own"),
        (pd.DataFrame({"text": ["a"], "label": pd.arrays.SparseArray([0])}), "Sparse pandas data"),
        (pl.LazyFrame({"text": ["a"]}), r"cannot be given as LazyFrame.*collect\(\)"),
        ([None], "1 values without a text"),
        (7, "cannot be given as int"),
        ({"train": 1, "test": 2}, r"a dict of 'train', 'test'.*Choose one"),
        ([{"text": "a", "label": {1, 2}}], r"prompts\[0\] cannot be written as JSON"),
        (pd.DataFrame({"text": ["a", 1]}), "no table for Arrow"),
        (pa.table({"text": pa.array([], pa.string())}), "hold no rows"),
        (datasets.Dataset.from_dict({"text": []}), "hold no rows"),
        (datasets.Dataset.from_dict({"text": TEXTS}).with_transform(lambda rows: {"text": rows["text"][::-1]}), "has a transform"),
        ((text for text in TEXTS), "cannot be given as generator"),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, str) else "",
)
def test_what_is_no_prompt_is_refused(prompts: Any, said: str) -> None:
    with pytest.raises(PromptsError, match=said):
        rows(prompts)


def test_errors_name_prompts_in_memory_and_not_the_file_that_holds_them() -> None:
    """Whether the file alone is meant or one of several problems is about it."""
    with pytest.raises(PromptsError, match=r"^rows in memory has neither") as raised:
        rows(pa.table({"label": LABELS}))
    assert "m2ray-prompts-" not in str(raised.value)
    with pytest.raises(PromptsError, match=r"5 problems were found") as raised, as_file(TEXTS) as path:
        raise_all([PromptsError(f"Row {row} of {path} is bad.", "Write it again.") for row in range(5)])
    assert str(raised.value).count("of 5 texts in memory is bad") == 5


def test_an_encoding_is_refused_since_nothing_in_memory_has_one() -> None:
    said = r"^encoding = 'utf-16' is given, but 5 texts in memory is no text file"
    with pytest.raises(PromptsError, match=said), as_file(TEXTS) as path:
        PromptSource.open(PromptOptions(path, max_length=9, encoding="utf-16"))
