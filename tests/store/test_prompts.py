"""Prompts in an object store: every format, folders and globs, row for row and digest for digest as from a disk."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, disable_progress_bar

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource
from m2ray.prompts.remote import find
from m2ray.prompts.template_file import read_template
from m2ray.storage import open_store
from tests.store.test_model import upload

TEXTS = [f"prompt {number}, 河水" for number in range(700)]


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    name = path.name.lower()
    if name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".json.zst"):
        path.write_bytes(pa.compress(json.dumps([{"text": text} for text in TEXTS]).encode(), "zstd", asbytes=True))
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as file:
            file.write_table(pa.table({"text": TEXTS}), max_chunksize=100)
    elif name.endswith(".txt"):
        path.write_text("\n".join(TEXTS))
    elif name.endswith(".csv"):
        pa_csv.write_csv(pa.table({"text": TEXTS}), path)
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))}), path, row_group_size=100)
    else:
        Dataset.from_dict({"text": TEXTS}).save_to_disk(path, num_shards=2)


def source(prompts: str | Path) -> PromptSource:
    return PromptSource.open(PromptOptions(str(prompts), 100))


def rows(prompts: str | Path) -> list[PromptRow]:
    return list(source(prompts).rows())


@pytest.fixture(autouse=True)
def _quiet_datasets() -> None:
    disable_progress_bar()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.txt", "a.csv", "a.parquet", "a.arrow", "saved"])
def test_every_format_gives_the_rows_of_the_disk(tmp_path: Path, url: str, name: str) -> None:
    write(tmp_path / "in" / name)
    upload(tmp_path / "in", url)
    remote, local = source(f"{url}/{name}"), source(tmp_path / "in" / name)
    assert list(remote.rows()) == list(local.rows())
    assert [row.text for row in remote.rows()] == TEXTS
    assert remote.names == local.names
    assert remote.fingerprint() == local.fingerprint()


FILES = ("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl", "sub/part-1.jsonl", "sub/part-22.jsonl")
HIDDEN = (".hidden.jsonl", "_tmp/e.jsonl", "sub/.git/f.jsonl", "_SUCCESS")


def test_a_folder_and_globs_find_the_files_of_the_disk(tmp_path: Path, url: str) -> None:
    for name in FILES + HIDDEN:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    upload(tmp_path / "in", url)
    open_store(f"{url}-2").put("neighbour.jsonl", b'{"text": "of a folder whose name begins alike"}\n')
    for pattern in (
        "",
        "*.jsonl",
        "sub/*",
        "**/*.jsonl",
        "sub/**",
        "*/*/*.jsonl",
        "sub/part-?.jsonl",
        "sub/part-[0-9][0-9].jsonl",
        "_tmp/*",
    ):
        remote, local = source(f"{url}/{pattern}"), source(tmp_path / "in" / pattern)
        assert remote.names == local.names, pattern
        assert [row.text for row in remote.rows()] == [row.text for row in local.rows()], pattern


def test_options_of_the_url_go_along_with_a_glob(url: str) -> None:
    open_store(url).put("part-1.txt", b"one")
    assert [row.text for row in rows(f"{url}/part-?.txt?region=us-east-1")] == ["one"]
    ((path, _),) = find(f"{url}/part-1.txt?region=us-east-1")[1]
    assert path.store.url.endswith("?region=us-east-1")


def test_what_is_not_there_or_not_readable_is_named(tmp_path: Path, url: str) -> None:
    store = open_store(url)
    for prompts in (f"{url}/no.jsonl", f"{url}/*.jsonl", url):
        with pytest.raises(PromptsError, match=r"No file matches s3://.*\*\.jsonl|The prompts s3://.* are absent"):
            source(prompts)
    with pytest.raises(PromptsError, match="NoSuchBucket"):
        source("s3://m2ray-no-such-bucket/prompts")
    store.put("in/photo.png", b"")
    with pytest.raises(PromptsError, match=r"photo\.png is unknown"):
        source(f"{url}/in")
    store.put("broken.parquet", b"PAR1 is not all of it")
    with pytest.raises(PromptsError, match=r"s3://.*broken\.parquet is damaged"):
        source(f"{url}/broken.parquet")
    DatasetDict(train=Dataset.from_dict({"text": TEXTS}), test=Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "splits")
    upload(tmp_path / "splits", f"{url}/splits")
    with pytest.raises(PromptsError, match=r"s3://.*/splits holds several splits: test, train"):
        source(f"{url}/splits")
    assert len(rows(f"{url}/splits/train")) == len(TEXTS)
    named = PromptSource.open(PromptOptions(f"{url}/splits", 100, split="train"))
    assert [row.text for row in named.rows()] == TEXTS


def test_a_folder_of_the_hub_and_a_template_file(url: str) -> None:
    store = open_store(url)
    for name in ("README.md", ".gitattributes", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"):
        store.put(f"hub/{name}", json.dumps({"text": name}).encode())
    assert PromptSource.open(PromptOptions(f"{url}/hub", 100, split="test")).names == ("data/test-00000-of-00001.jsonl",)
    store.put("own.jinja", b"{{ messages }}")
    assert read_template(f"{url}/own.jinja") == "{{ messages }}"
    with pytest.raises(PromptsError, match=r"There is no s3://.*/absent\.jinja"):
        read_template(f"{url}/absent.jinja")


def test_a_file_that_goes_away_meanwhile_is_named(url: str) -> None:
    store = open_store(url)
    store.put("a.jsonl", b'{"text": "x"}\n')
    opened = source(f"{url}/a.jsonl")
    store.delete(["a.jsonl"])
    for read in (lambda: list(opened.rows()), opened.fingerprint):
        with pytest.raises(PromptsError, match=r"a\.jsonl"):
            read()


def test_a_large_file_is_read_in_bounded_memory(url: str) -> None:
    open_store(url).put("large.jsonl", (json.dumps({"text": "x" * 10_000}) + "\n").encode() * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in source(f"{url}/large.jsonl").rows())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak_bytes < 40_000_000, "the file has 100 MB"
