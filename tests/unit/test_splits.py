"""A folder as a hub of datasets leaves it: what holds no rows is passed over, and of several splits the named one is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource
from m2ray.prompts.splits import split_of


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    return tmp_path / "folder"


def source(path: Path | str, **options: Any) -> PromptSource:
    return PromptSource.open(PromptOptions(str(path), 100, **options))


BESIDE = (
    *(
        ".gitattributes",
        ".cache/huggingface/download/data/train.jsonl.metadata",
        "README.md",
        "readme.txt",
        "LICENSE",
        "LICENSE.md",
        "NOTICE",
    ),
    *("dataset_infos.json", "dataset_info.json"),
)


def test_what_holds_no_rows_is_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *BESIDE, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
    assert source(folder).names == ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
    assert source(folder / "readme.txt").names == ("readme.txt",), "a file that is named is read"
    of_rows = {"notice.jsonl", "data/readme.json"}
    assert of_rows <= set(source(folder_of(tmp_path, *of_rows)).names), "a format of rows holds rows"
    with pytest.raises(PromptsError, match="photo.png is unknown"):
        source(folder_of(tmp_path, "photo.png"))


def test_a_folder_of_readmes_holds_no_rows(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="holds no files with rows"):
        source(folder_of(tmp_path, "README.md"))


def test_of_several_splits_one_has_to_be_named(tmp_path: Path) -> None:
    names = (
        "data/train_sft-00000-of-00001.jsonl",
        "data/train_gen-00000-of-00001.jsonl",
        "data/test_sft-00000-of-00001.jsonl",
        "more.jsonl",
    )
    folder = folder_of(tmp_path, *names)
    with pytest.raises(PromptsError, match=r'several splits: test_sft, train_gen, train_sft. Name one: split = "test_sft"'):
        source(folder)
    assert source(folder, split="train_sft").names == (names[0],)
    with pytest.raises(
        PromptsError, match=r"no split 'train'. Did you mean 'train_sft'\? Set split to one of: test_sft, train_gen, train_sft"
    ):
        source(folder, split="train")
    assert len(source(folder / "**" / "*.jsonl").names) == 4, "a glob has been chosen already"


def test_where_there_are_no_splits_none_can_be_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl", "b.jsonl")
    assert source(folder).names == ("a.jsonl", "b.jsonl")
    with pytest.raises(PromptsError, match="no split 'train'. Its files name no splits: leave split out"):
        source(folder, split="train")
    with pytest.raises(PromptsError, match=r"split = 'train' is given, but .*a.jsonl is no folder that has splits"):
        source(folder / "a.jsonl", split="train")


def test_one_split_needs_no_name(tmp_path: Path) -> None:
    assert source(folder_of(tmp_path, "train.jsonl", "more.jsonl")).names == ("more.jsonl", "train.jsonl")
    assert source(tmp_path / "folder", split="train").names == ("train.jsonl",)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train"),
        ("data/aime24-00000-of-00001.parquet", "aime24"),
        ("en/c4-train.00000-of-01024.json.gz", "en/c4-train"),
        ("main/test-00000-of-00001.parquet", "main/test"),
        ("default/train/0000.parquet", "default/train"),
        ("data/train/part-00000-of-00009.jsonl", "train"),
        ("gsm8k_Test.jsonl", "test"),
        ("my-dev-set.v2.csv", "dev"),
        ("constraints.txt", None),
        ("part-1.jsonl", None),
        ("data/latest.jsonl", None),
    ],
)
def test_a_files_split_is_in_its_name(name: str, split: str | None) -> None:
    assert split_of(name) == split
