"""Prompts that are in memory: written to a file for the length of a run, which then reads them as it reads any others.

The same values make the same file, bit by bit, so that a run goes on where they are given again, and is refused where they are others.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import isnan
from numbers import Integral
from os import PathLike, fspath
from os.path import exists
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from m2ray.errors import M2rayError, PromptsError, StoreError
from m2ray.prompts.kept import plain_type, shortened
from m2ray.storage import remedy_for


class _ArrowStream(Protocol):
    """Tables of pyarrow, polars, pandas, DuckDB and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class _Dataset(Protocol):
    """A datasets.Dataset, as far as it is looked at."""

    def with_format(self, type: str) -> Any: ...  # noqa: A002


class _Array(Protocol):
    """Of NumPy or torch, or a column of a frame."""

    def tolist(self) -> Any: ...


Chat = Sequence[Mapping[str, Any]]
"""A prompt as messages, each with `role` and `content`."""

Prompts = (
    str
    | PathLike[str]
    | Sequence[str]
    | Sequence[Chat]
    | Sequence[Sequence[int]]
    | Sequence[_Array]
    | Sequence[Mapping[str, Any]]
    | _ArrowStream
    | _Dataset
    | _Array
)
"""A path or URL; or in memory: texts, chats, token ids, rows as dicts, or a table: of Arrow, pandas, polars or datasets.Dataset."""

_FOLDER = "m2ray-prompts-"
_MAGIC = frozenset("*?[")
_ROWS_AT_ONCE = 1024
_COLUMNS = {"texts": "text", "chats": "messages", "token ids": "input_ids"}
"""The columns that a list's prompts become."""

_GIVE = (
    "Give a list of texts, of chats (lists of messages), of token ids or of rows (dicts), or a frame, an Arrow table or a datasets.Dataset."
)

_NO_ROWS = "The prompts hold no rows.", "Give at least one prompt; of what can be read once only, give it anew."


@contextmanager
def as_file(prompts: Prompts) -> Iterator[str]:
    """The path or URL of prompts. What is in memory lies in a temporary file as long as the context lasts, and errors call it what it is.

    Raises:
        PromptsError: nothing that prompts are given as; or they are of several kinds, or no values of a file.
        StoreError: the temporary folder has no room.
    """
    if isinstance(prompts, str | PathLike):
        yield _path(prompts)
        return
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as folder:
        try:
            path = _written(prompts, Path(folder))
        except OSError as error:
            raise StoreError(
                f"Cannot keep the prompts in the temporary folder {folder}: {error.strerror}.", remedy_for(error, Path(folder))
            ) from error
        with _named_in_errors(str(path)):
            yield str(path)


@contextmanager
def _named_in_errors(path: str) -> Iterator[None]:
    """Raise an error of m2ray's again, with what the prompts are in place of a path that no user knows."""
    file = Path(path).name

    def named(words: Any) -> Any:
        if isinstance(words, str):
            return words.replace(path, name_in_memory(path)).replace(file, name_in_memory(path))
        return [named(line) for line in words] if isinstance(words, Sequence) else words

    try:
        yield
    except M2rayError as error:
        if file not in str(error):
            raise
        raise type(error)(*map(named, error.args)) from error


def name_in_memory(address: str) -> str:
    """What a run calls prompts that were in memory, such as "64 rows in memory", for the path of their file; any other address as it is."""
    path = Path(address)
    return path.stem.replace("-", " ") if path.parent.name.startswith(_FOLDER) else address


def _path(prompts: str | PathLike[str]) -> str:
    """A path or URL; a str that reads as a text and is no file's name is refused, since it was meant for a prompt."""
    is_text = isinstance(prompts, str) and len(prompts.split()) > 1 and "://" not in prompts and not _MAGIC & set(prompts)
    if is_text and not exists(prompts):  # noqa: PTH110 - Path's own fails for a name as long as a text
        raise PromptsError(
            f"prompts = {shortened(prompts)} is taken for a path, and there is nothing of that name.",
            "Give a text as a list: prompts=[text].",
        )
    return fspath(prompts)


def _written(prompts: Any, folder: Path) -> Path:
    if isinstance(prompts, Mapping):
        splits = ", ".join(map(repr, islice(prompts, 5)))
        raise PromptsError(f"The prompts are a {type(prompts).__name__} of {splits}.", f"Choose one: prompts[...]. {_GIVE}")
    try:
        if (column := _column(prompts)) is not None:
            return _write_lines(column, folder)
        if (batches := _batches(prompts)) is not None:
            return _write_table(batches, folder / "rows-in-memory.arrow")
    except pa.ArrowException as error:
        raise PromptsError(
            f"The {type(prompts).__name__} is no table for Arrow: {error}.", "Give each column a name of its own and values of one type."
        ) from error
    rows = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(rows, Sequence) or isinstance(rows, bytes | bytearray | memoryview):
        lazy = ", such as what its collect() gives" if hasattr(prompts, "collect") else ""
        raise PromptsError(
            f"Prompts cannot be given as {type(prompts).__name__}.", _GIVE.replace(" or a datasets", f"{lazy} or a datasets")
        )
    return _write_lines([None if _is_missing(row) else row for row in rows], folder)


def _column(prompts: Any) -> list[Any] | None:
    """The values of a column of a frame or table, None where one is missing; None of what is no column."""
    if isinstance(prompts, pa.Array | pa.ChunkedArray):
        return list(prompts.to_pylist())
    if _library(prompts) == "pandas" and type(prompts).__name__ != "DataFrame":
        return list(pa.Array.from_pandas(prompts).to_pylist())
    return prompts.to_list() if _library(prompts) == "polars" and type(prompts).__name__ == "Series" else None


def _is_missing(row: Any) -> bool:
    """What pandas' columns give in lists for nothing: NaN, NA."""
    return (isinstance(row, float) and isnan(row)) or type(row).__name__ == "NAType"


# -- tables ---------------------------------------------------------------------------------------------------------------


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _batches(prompts: Any) -> Iterable[Any] | None:
    """A table's record batches, or tables; None of what is no table."""
    if _library(prompts) == "datasets" and hasattr(prompts, "with_format"):
        if (getattr(prompts, "format", None) or {}).get("type") == "custom":
            raise PromptsError(
                "The datasets.Dataset has a transform (with_transform), which its table does not have: its own values would be run, not what it gives.",
                "Give what dataset.with_format(None).map(...) makes of it, or a list of its rows: [*dataset].",
            )
        return prompts.with_format("arrow").iter(_ROWS_AT_ONCE)  # type: ignore[no-any-return]
    if _library(prompts) == "pandas":
        try:
            return pa.Table.from_pandas(prompts, preserve_index=False).to_batches()  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:  # two columns of a name, sparse columns
            raise pa.ArrowInvalid(str(error).rstrip(".")) from error
    if _library(prompts) == "polars" and hasattr(prompts, "to_arrow"):
        # As Arrow had it first: of categories over views of text, which polars has now, Arrow cannot take rows.
        return prompts.to_arrow(compat_level=sys.modules["polars"].CompatLevel.oldest()).to_batches()  # type: ignore[no-any-return]
    if hasattr(prompts, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(prompts)  # type: ignore[no-any-return]
    return None


def _write_table(batches: Iterable[Any], path: Path) -> Path:
    """Equal tables make equal files, however they lie in memory: batches of one size, of plain types, without what libraries say of themselves."""
    stream = None
    with pa.OSFile(str(path), "wb") as file:
        for table in _evenly(batches):
            plain = pa.schema([pa.field(field.name, plain_type(field.type)) for field in table.schema])
            stream = stream or pa.ipc.new_stream(file, plain)
            # Fresh arrays: no bits of other rows, of a slice or beneath nulls.
            stream.write_table(table.cast(plain).take(pa.array(range(table.num_rows), pa.int64())).combine_chunks())
        if stream is None:
            raise PromptsError(*_NO_ROWS)
        stream.close()
    return path


def _evenly(batches: Iterable[Any]) -> Iterator[Any]:
    """Tables of `_ROWS_AT_ONCE` rows; the last may have fewer."""
    held: list[Any] = []
    for batch in batches:
        held.append(batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch]))
        while sum(table.num_rows for table in held) >= _ROWS_AT_ONCE:
            whole = pa.concat_tables(held)
            yield whole.slice(0, _ROWS_AT_ONCE)
            held = [whole.slice(_ROWS_AT_ONCE)]
    if held and (rest := pa.concat_tables(held)).num_rows:
        yield rest


# -- lists ----------------------------------------------------------------------------------------------------------------


def _write_lines(rows: Sequence[Any], folder: Path) -> Path:
    if not rows:
        raise PromptsError(*_NO_ROWS)
    kinds = [_kind(row) for row in rows]
    kind = next((found for found in kinds if found), None)
    if kind is None:
        raise PromptsError(f"The prompts are {len(rows):,} values without a text, a message or a token id.", _GIVE)
    if other := next((place for place, found in enumerate(kinds) if found not in (kind, None)), None):
        first = kinds.index(kind)
        raise PromptsError(f"prompts[{first}] is of {kind}, and prompts[{other}], {shortened(rows[other])}, is of {kinds[other]}.", _GIVE)
    path = folder / f"{len(rows)}-{kind.replace(' ', '-')}-in-memory.jsonl"
    with path.open("w", encoding="ascii") as file:
        for place, row in enumerate(rows):
            try:
                file.write(json.dumps({_COLUMNS[kind]: row} if kind in _COLUMNS else row or {}, default=_plain) + "\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise PromptsError(
                    f"prompts[{place}] cannot be written as JSON: {error}.", "Give such values in a frame or an Arrow table."
                ) from error
    return path


def _kind(row: Any) -> str | None:
    """What a list's element is; None where it is empty, and its row will be quarantined. Raises PromptsError for what is no prompt."""
    if row is None or isinstance(row, str):
        return None if row is None else "texts"
    if isinstance(row, Mapping):
        if "role" in row:
            raise PromptsError(
                f"The prompts are messages of one chat: {shortened(row)} ...", "Give a list of chats: [[{...}, {...}], ...]."
            )
        if other := next((key for key in row if not isinstance(key, str)), None):
            raise PromptsError(f"A row has the key {shortened(other)}, of {type(other).__name__}.", "Name columns by texts.")
        return "rows"
    elements = row.tolist() if hasattr(row, "tolist") else row
    if isinstance(elements, Integral) and not isinstance(elements, bool):
        raise PromptsError(f"The prompts are the token ids of one: {shortened(row)} ...", "Give a list for each prompt: [[1, 2, 3], ...].")
    if not isinstance(elements, Sequence) or isinstance(elements, bytes):
        raise PromptsError(f"A prompt is {shortened(row)}, of {type(row).__name__}.", _GIVE)
    if not elements:
        return None
    if all(isinstance(one, Integral) and not isinstance(one, bool) for one in elements):
        return "token ids"
    if all(isinstance(one, Mapping) for one in elements):
        return "chats"
    raise PromptsError(f"A prompt is neither messages nor token ids: {shortened(row)}.", _GIVE)


def _plain(value: Any) -> Any:
    """An array or a number of NumPy or torch as JSON has it. Raises TypeError for anything else."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{shortened(value)} is a {type(value).__name__}")
