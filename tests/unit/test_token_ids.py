"""Prompts that are token ids already: taken as they are, padding at one end dropped, everything else quarantined."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.logging import disable_progress_bar

from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, PromptTokenizer

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
VOCAB_SIZE = 320

ROWS: list[dict[str, Any]] = [
    {"input_ids": [0, 5, 9], "attention_mask": [1, 1, 1], "loss_mask": [0, 0, 1]},
    {"input_ids": [7, 8, 2, 2], "attention_mask": [1, 1, 0, 0], "loss_mask": [0, 1, 0, 0]},
    {"input_ids": [2, 7], "attention_mask": [0, 1], "loss_mask": [0, 1]},
    {"input_ids": [0, 0, 319], "attention_mask": None, "loss_mask": None},
]
TOKENS = [[0, 5, 9], [7, 8], [7], [0, 0, 319]]


def tokens_of(path: Path, **options: Any) -> list[Any]:
    chosen = PromptOptions(str(path), 100, **options)
    encoded = PromptTokenizer.load(str(TINY), chosen, VOCAB_SIZE).encode(list(PromptSource.open(chosen).rows()))
    return [ids if isinstance(ids, str) else ids.tolist() for ids in encoded]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved", "a.csv"])
def test_every_format_gives_the_ids_as_they_are(tmp_path: Path, name: str) -> None:
    disable_progress_bar()
    path = tmp_path / name
    by_column = {column: [row[column] for row in ROWS] for column in ROWS[0]}
    if name == "a.jsonl":
        write_jsonl(path, ROWS)
    elif name == "a.parquet":
        pq.write_table(pa.table(by_column), path)
    elif name == "saved":
        datasets.Dataset.from_dict(by_column).save_to_disk(path)
    else:
        texts = [["" if value is None else json.dumps(value) for value in row.values()] for row in ROWS]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([by_column.keys(), *texts])
    assert tokens_of(path) == TOKENS
    assert tokens_of(path, special_tokens="none") == TOKENS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": None}, "null"),
        ({"input_ids": 5}, "input_ids are not a list but int"),
        ({"input_ids": [1, -1]}, "input_ids: -1 at place 1 is not a whole number from 0 to 2147483647"),
        ({"input_ids": [1, 2.0]}, "input_ids: 2.0 at place 1"),
        ({"input_ids": [True]}, "input_ids: True at place 0"),
        ({"input_ids": [2**31]}, "input_ids: 2147483648 at place 0"),
        ({"input_ids": [1, VOCAB_SIZE]}, "token id 320 is beyond the model's vocabulary of 320 tokens"),
        ({"input_ids": [1] * 101}, "101 tokens, more than max_length 100"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "empty"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask marks more than padding at one end"),
        ({"input_ids": [1, 2, 3], "attention_mask": [0, 1, 0]}, "attention_mask marks more than padding at one end"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 2, 3]}, "attention_mask: 2 at place 1 is not a whole number from 0 to 1"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "attention_mask has 2 entries for the 3 of input_ids"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1]}, "loss_mask has 1 entries for the 3 of input_ids"),
    ],
)
def test_what_is_no_row_of_token_ids_is_quarantined(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    bad, good = tokens_of(write_jsonl(tmp_path / "a.jsonl", [row, {"input_ids": [1, 2, 3], "loss_mask": [True, False, True]}]))
    assert good == [1, 2, 3]
    assert bad.startswith(reason)


def test_another_column_is_read_when_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"ids": [4, 5], "text": "as words"}])
    assert tokens_of(path, input_ids_column="ids") == [[4, 5]]
