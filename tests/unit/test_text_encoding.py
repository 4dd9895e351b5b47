"""Text that is not UTF-8: said by name where it is a file's, one row's reason where it is one row, and read as the user says."""

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError, PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource
from m2ray.prompts.fingerprint import Fingerprint

TEXTS = ["河水很低。", "He said: now", "渡河，带走一切", "二\n行"]


def source(path: Path, **options: Any) -> PromptSource:
    return PromptSource.open(PromptOptions(str(path), 100, **options))


def rows_of(path: Path, **options: Any) -> list[PromptRow]:
    return list(source(path, **options).rows())


def written(path: Path, encoding: str, texts: list[str] = TEXTS) -> Path:
    buffer = io.StringIO(newline="")
    if ".csv" in path.name:
        csv.writer(buffer).writerows([["text"], *([text] for text in texts)])
    elif ".jsonl" in path.name:
        buffer.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    elif ".json" in path.name:
        json.dump([{"text": text} for text in texts], buffer, ensure_ascii=False)
    else:
        buffer.write("\n".join(text.replace("\n", " ") for text in texts))
    data = buffer.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
def test_a_named_encoding_gives_the_texts(tmp_path: Path, name: str, encoding: str) -> None:
    path = written(tmp_path / name, encoding)
    opened = source(path, encoding=encoding)
    seen = Fingerprint()
    assert [row.text for row in opened.rows(seen)] == [text.replace("\n", " ") if name == "a.txt" else text for text in TEXTS]
    assert seen.hexdigest() == opened.fingerprint(), "of the bytes as they are"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
def test_a_file_in_gbk_is_refused_and_shown_as_others_read_it(tmp_path: Path, name: str) -> None:
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS * 3) if "He" not in text]
    with pytest.raises(PromptsError, match=r"(?s)is not utf-8: byte \d+ of (line|element) \d \(0xba\) is wrong.*Set encoding") as caught:
        rows_of(written(tmp_path / name, "gbk", texts))
    assert "gb18030: '河水很低" in str(caught.value)
    assert "cp1252: 'ºÓË®" in str(caught.value)


def test_a_header_in_another_encoding_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("编号,文本\n1,a\n2,b\n3,c\n".encode("gbk"))
    with pytest.raises(PromptsError, match=r"byte 0 of line 1 \(0xb1\) is wrong"):
        source(tmp_path / "a.csv", text_column="文本")
    assert [row.text for row in rows_of(tmp_path / "a.csv", text_column="文本", encoding="gbk")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", 'begins with the bytes ff fe, as utf-16 does. Set encoding = "utf-16"'),
        ("utf-32", 'begins with the bytes ff fe 00 00, as utf-32 does. Set encoding = "utf-32"'),
        ("utf-16-le", 'are zero, as in utf-16-le. Set encoding = "utf-16-le"'),
        ("utf-16-be", 'are zero, as in utf-16-be. Set encoding = "utf-16-be"'),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_utf_16_is_known_by_its_first_bytes(tmp_path: Path, name: str, encoding: str, words: str) -> None:
    with pytest.raises(PromptsError) as caught:
        rows_of(written(tmp_path / name, encoding))
    assert words in str(caught.value)


def test_rows_that_are_not_of_the_named_encoding_cost_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n".join(["河水".encode("gbk"), "河".encode("gbk") + b"\xff x", b"c", b"d"]))
    found = [(row.text, row.reason) for row in rows_of(tmp_path / "a.txt", encoding="gb18030")]
    assert found == [("河水", None), (None, "invalid gb18030 at character 1 of its line"), ("c", None), ("d", None)]
    lone = "a\n\ud800\nc\n".encode("utf-16-le", "surrogatepass")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + lone)
    assert [row.reason for row in rows_of(tmp_path / "a.txt", encoding="utf-16")] == [
        None,
        "invalid utf-16 at character 0 of its line",
        None,
    ]


def test_where_a_wrong_encoding_leaves_no_lines_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes("a\nb\n".encode("utf-16")[:-1])
    with pytest.raises(PromptsError, match="cut.txt is not utf-16: truncated data"):
        rows_of(tmp_path / "cut.txt", encoding="utf-16")
    for text in ("a\nb\n".encode("utf-16-le"), "编号,text\n".encode("gbk")):
        (tmp_path / "unmarked.csv").write_bytes(text)
        with pytest.raises(PromptsError, match=r"unmarked.csv cannot be read as utf-16: .*Set encoding to what the file was written in"):
            rows_of(tmp_path / "unmarked.csv", encoding="utf-16")
    path = written(tmp_path / "a.txt", "utf-8", ["渡河"] * 9)
    with pytest.raises(PromptsError, match=r"a.txt is not ascii: character 0 of line 1 is wrong, and so in 9 of its first 9 lines"):
        rows_of(path, encoding="ascii")


def test_an_encoding_is_of_no_use_to_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(PromptsError, match=r"encoding = 'gb18030' is given, but .*a.parquet is no text file"):
        source(tmp_path / "a.parquet", encoding="gb18030")


def test_an_encoding_is_one_of_pythons() -> None:
    given = {"model": "m", "prompts": "p", "output": "o"}
    assert ExtractConfig.validated({**given, "encoding": "UTF8"}).encoding == "utf-8"
    assert ExtractConfig.validated({**given, "encoding": "GB18030"}).encoding == "gb18030"
    for wrong in ("latin-9999", "rot13", ""):
        with pytest.raises(ConfigError, match="encoding = .* is not the name of a text encoding"):
            ExtractConfig.validated({**given, "encoding": wrong})


@pytest.mark.parametrize(("encoding", "words"), [("utf-16", "does not start with BOM"), ("idna", "Unsupported error handling")])
def test_an_encoding_that_cannot_be_told_or_is_of_no_texts_is_refused(tmp_path: Path, encoding: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"text": "a"}'.encode("utf-16-le"))
    with pytest.raises(PromptsError, match=rf"p\.jsonl cannot be read as {encoding}: .*{words}"):
        rows_of(tmp_path / "p.jsonl", encoding=encoding)
    assert [row.text for row in rows_of(tmp_path / "p.jsonl", encoding="utf-16-le")] == ["a"]
