"""Prompts that are in memory: written to a file for the length of a run, which then reads them as it reads any others.

The same values make the same file, bit by bit, so that a run goes on where they are given again, and is refused where they are others.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from m2ray.errors import PromptsError, StoreError
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
_ROWS_AT_ONCE = 1024
_COLUMNS = {"texts": "text", "chats": "messages", "token ids": "input_ids"}
"""The columns that a list's prompts become."""

_GIVE = (
    "Give a list of texts, of chats (lists of messages), of token ids or of rows (dicts), or a frame, an Arrow table or a datasets.Dataset."
)


@contextmanager
def as_file(prompts: Prompts) -> Iterator[str]:
    """The path or URL of prompts. What is in memory lies in a temporary file as long as the context lasts.

    Raises:
        PromptsError: nothing that prompts are given as; or they are of several kinds, or no values of a file.
        StoreError: the temporary folder has no room.
    """
    if isinstance(prompts, str | PathLike):
        yield fspath(prompts)
        return
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as folder:
        try:
            path = _written(prompts, Path(folder))
        except OSError as error:
            raise StoreError(
                f"Cannot keep the prompts in the temporary folder {folder}: {error.strerror}.", remedy_for(error, Path(folder))
            ) from error
        yield str(path)


def name_in_memory(address: str) -> str:
    """What a run calls prompts that were in memory, such as "64 rows in memory", for the path of their file; any other address as it is."""
    path = Path(address)
    return path.stem.replace("-", " ") if path.parent.name.startswith(_FOLDER) else address


def _written(prompts: Any, folder: Path) -> Path:
    if isinstance(prompts, Mapping):
        splits = ", ".join(map(repr, islice(prompts, 5)))
        raise PromptsError(f"The prompts are a {type(prompts).__name__} of {splits}.", f"Choose one: prompts[...]. {_GIVE}")
    if _library(prompts) in ("pandas", "polars") and not hasattr(prompts, "columns"):
        prompts = prompts.to_list()  # a column of a frame
    try:
        if (batches := _batches(prompts)) is not None:
            return _write_table(batches, folder / "rows-in-memory.arrow")
    except pa.ArrowException as error:
        raise PromptsError(
            f"The {type(prompts).__name__} is no table for Arrow: {error}.", "Give each column values of one type."
        ) from error
    rows = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(rows, Sequence):
        raise PromptsError(f"Prompts cannot be given as {type(prompts).__name__}.", _GIVE)
    return _write_lines(rows, folder)


# -- tables ---------------------------------------------------------------------------------------------------------------


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _batches(prompts: Any) -> Iterable[Any] | None:
    """A table's record batches, or tables; None of what is no table."""
    if _library(prompts) == "datasets" and hasattr(prompts, "with_format"):
        return prompts.with_format("arrow").iter(_ROWS_AT_ONCE)  # type: ignore[no-any-return]
    if _library(prompts) == "pandas":
        return pa.Table.from_pandas(prompts, preserve_index=False).to_batches()  # type: ignore[no-any-return]
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
            raise PromptsError("The prompts hold no rows.", "Give at least one prompt.")
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
        return "rows"
    elements = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(elements, Sequence):
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
