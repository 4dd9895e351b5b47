"""Small prompt files that come to much when they are read: bounded memory, and rows beyond the stated size are quarantined.

The files here are harmless: tens of megabytes stand for gigabytes, and the limits are lowered as much.
"""

import csv
import gzip
import json
import re
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, arrow_files, readers, rows
from m2ray.prompts.arrow_sizes import row_sizes
from m2ray.prompts.memory import limited
from m2ray.prompts.rows import MAX_PROMPT_BYTES, PromptRow
from m2ray.prompts.surveying import row_batches

LIMIT_BYTES = 48 << 20
TEXT = "x" * (1 << 20)


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "READ_BYTES", LIMIT_BYTES)


def read(path: Path, **options: Any) -> list[PromptRow]:
    return list(PromptSource.open(PromptOptions(str(path), max_length=100, **options)).rows())


def peak_bytes(work: Any) -> int:
    """What the process grows by while it works."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def walk(path: Path, **options: Any) -> int:
    return sum(1 for _ in PromptSource.open(PromptOptions(str(path), max_length=100, **options)).rows())


def refusal_in_a_new_process(path: Path) -> str:
    """What a process says that has nothing but this to read: one that has freed memory before may read more without growing."""
    script = (
        "import sys; from m2ray.errors import PromptsError; from m2ray.options import PromptOptions\n"
        f"from m2ray.prompts import PromptSource, arrow_files; arrow_files.READ_BYTES = {LIMIT_BYTES}\n"
        "try: list(PromptSource.open(PromptOptions(sys.argv[1], max_length=100)).rows())\n"
        "except PromptsError as error: print(error)"
    )
    return subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("layout", ["dictionary", "plain"])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "snappy"])
def test_a_row_group_that_is_written_out_as_more(tmp_path: Path, codec: str, layout: str) -> None:
    path = tmp_path / "a.parquet"
    texts = [TEXT] * 200 if layout == "dictionary" else [f"{number}{TEXT}" for number in range(240)]
    pq.write_table(pa.table({"text": texts}), path, compression=codec, use_dictionary=layout == "dictionary", write_batch_size=8)
    assert path.stat().st_size < 12 << 20
    num_rows = 0

    def walked() -> None:
        nonlocal num_rows
        num_rows = walk(path)

    assert peak_bytes(walked) < 4 * LIMIT_BYTES  # read as a whole it takes twice as much and more
    assert num_rows == len(texts)


def test_rows_come_once_and_in_order_though_fewer_are_decoded_at_a_time(tmp_path: Path) -> None:
    lengths = [10] * 700 + [1 << 20] * 100 + [20] * 300
    texts = [f"{number:07} {'x' * length}" for number, length in enumerate(lengths)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_batch_size=8)
    assert [row.text for row in read(tmp_path / "a.parquet")] == texts


def test_a_page_that_no_limit_holds_is_refused_by_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "x" * (300 << 20)]}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert re.search(r"of row group 0 of .*a\.parquet takes more than 50,331,648 bytes", refusal_in_a_new_process(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_beyond_the_stated_size_keep_their_ids(tmp_path: Path, kind: str) -> None:
    long = [{"role": "user", "content": "x" * (MAX_PROMPT_BYTES // 4)}] * 5
    table = pa.table({"id": ["a", "b", "c"], "messages": [long[:1], long, long[:2]]})
    path = _written(table, tmp_path, kind)
    found = read(path, id_column="id")
    assert [row.row_id for row in found] == ["a", "b", "c"]
    assert [row.messages is not None for row in found] == [True, False, True]
    assert "bytes, more than 2097152" in str(found[1].reason)


def test_one_value_that_stands_for_all_rows_is_never_made_for_all(tmp_path: Path) -> None:
    """Dictionary, runs and views of Arrow: each row's text is its own once it is Python's."""
    text = pa.array([TEXT])
    columns = {
        "dictionary": pa.DictionaryArray.from_arrays(pa.array(np.zeros(300, np.int32)), text),
        "lists": pa.array([[TEXT] * 5, None, [TEXT]] * 20, pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    }
    for name, column in columns.items():
        path = _written(pa.table({"text": column}), tmp_path / name, "saved")
        assert peak_bytes(lambda path=path: walk(path)) < 3 * LIMIT_BYTES, name


def _written(table: pa.Table, folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
        return folder / "a.parquet"
    with pa.ipc.new_stream(folder / "data.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def test_a_compressed_batch_of_arrow_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": [TEXT] * 100})
    with pa.ipc.new_stream(tmp_path / "data.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    assert re.search(r"A record batch of .*data\.arrow takes more than", refusal_in_a_new_process(tmp_path / "data.arrow"))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_line_without_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) if name == "a.txt.gz" else pa.CompressedOutputStream(path, "zstd") as file:
        for _ in range(64):
            file.write(TEXT.encode())
        file.write(b"\nlast\n")
    assert peak_bytes(lambda: walk(path)) < 5 * MAX_PROMPT_BYTES
    assert [row.text for row in read(path)] == [None, "last"]


def test_a_csv_row_of_many_long_values(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", *map(str, range(30))], [f"a\n{TEXT}"] * 31])
    with pytest.raises(PromptsError, match="it has more than 8388608 bytes"):
        read(tmp_path / "a.csv")


def test_lines_with_ever_new_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MOST_COLUMNS", 100)
    lines = (json.dumps({"text": "a", **{f"{line}-{key}": 1 for key in range(20)}}) for line in range(50))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(PromptsError, match="more than 100 columns"):
        read(tmp_path / "a.jsonl")


def test_a_long_id_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "i" * 300, "text": "a"}) + "\n" + json.dumps({"id": "i" * 256, "text": "a"}))
    first, second = read(tmp_path / "a.jsonl", id_column="id")
    assert (len(first.row_id), first.reason) == (256, "its id has 300 characters, more than 256")
    assert (len(second.row_id), second.reason) == (256, None)


def test_batches_for_the_tokenizer_are_bounded_together() -> None:
    sizes = [MAX_PROMPT_BYTES, 1, MAX_PROMPT_BYTES - 1, 5, 5, MAX_PROMPT_BYTES]
    made = [PromptRow(number, str(number), text="", num_bytes=size) for number, size in enumerate(sizes)]
    assert [[row.num_bytes for row in batch] for batch in row_batches(made)] == [
        [MAX_PROMPT_BYTES],
        [1, MAX_PROMPT_BYTES - 1],
        [5, 5],
        [MAX_PROMPT_BYTES],
    ]


STRUCT = pa.struct([("role", pa.string()), ("content", pa.large_string())])


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["ab", None, ""], pa.string(), [2, 0, 0]),
        (["ab", None, "é"], pa.string_view(), [2, 0, 2]),
        ([b"abc", b""], pa.large_binary(), [3, 0]),
        ([1, None], pa.int64(), [4, 4]),
        ([None, None], pa.null(), [0, 0]),
        ([[1, 2, 3], None, []], pa.list_(pa.int64()), [12, 0, 0]),
        ([[1, 2], [3, 4]], pa.list_(pa.int16(), 2), [16, 16]),
        ([["ab", "c"], [], None], pa.list_(pa.string()), [11, 0, 0]),
        ([["ab", "c"], []], pa.list_view(pa.string()), [11, 0]),
        ([{"role": "u", "content": "abc"}, None], STRUCT, [4, 0]),
        ([[{"role": "u", "content": "abc"}], []], pa.list_(STRUCT), [8, 0]),
        ([[("k", "vv")], [("k", None), ("kk", "v")]], pa.map_(pa.string(), pa.string()), [7, 12]),
        (["ab", "ab", None], pa.dictionary(pa.int8(), pa.string()), [2, 2, 0]),
        (["ab", "ab", "c"], pa.run_end_encoded(pa.int32(), pa.string()), [2, 2, 1]),
    ],
)
def test_sizes_are_those_of_the_values(values: list[Any], kind: Any, expected: list[int]) -> None:
    runs = pa.RunEndEncodedArray.from_arrays([2, 3], ["ab", "c"])
    column = runs if pa.types.is_run_end_encoded(kind) else pa.array(values, kind)
    batch = pa.record_batch({"a": column})
    assert row_sizes(batch, ["a"])["a"].tolist() == expected
    assert row_sizes(batch.slice(1), ["a"])["a"].tolist() == expected[1:]


def test_the_limit_is_the_kernels_and_ends() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), limited(8 << 20):
        bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_limit_is_of_one_thread_at_a_time() -> None:
    """Else the second one would take the first one's limit for what was before, and leave it behind."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    is_in, is_out = threading.Event(), threading.Event()

    def second() -> None:
        with limited(1 << 30):
            is_in.set()
            assert is_out.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with limited(1 << 30):
            entering = pool.submit(second)
            assert not is_in.wait(0.2)
        is_out.set()
        entering.result(30)
    found = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert found == before
    assert rows.MAX_PROMPT_BYTES == MAX_PROMPT_BYTES
