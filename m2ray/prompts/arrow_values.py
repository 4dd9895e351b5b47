"""Rows of Parquet and Arrow as JSON would have them: what other rows' keys added is gone, and JSON text is parsed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from m2ray.batches import Int64Array
from m2ray.prompts.rows import MAX_PROMPT_BYTES, Record

_SMALL_BYTES = 4096


class _UnreadableError(ValueError):
    """Stands in a column for a value that is no UTF-8, no JSON or nothing that Python has."""


def arrow_records(batch: Any, columns: Sequence[str], sizes: Mapping[str, Int64Array]) -> Iterator[Record]:
    """The rows of a record batch, and what `row_sizes` says of them. What cannot be read, and what is too long, is its row's problem."""
    totals = sum(sizes.values(), np.zeros(batch.num_rows, np.int64))
    start = 0
    while start < batch.num_rows:
        fitting = int(np.searchsorted(np.cumsum(totals[start:]), MAX_PROMPT_BYTES, side="right"))
        if fitting:
            yield from _records(batch.slice(start, fitting), columns)
            start += fitting
        else:
            small = [name for name in columns if sizes[name][start] <= _SMALL_BYTES]  # the row's id is one
            values = next(_records(batch.slice(start, 1), small)).values
            yield Record(values, f"{totals[start]} bytes, more than {MAX_PROMPT_BYTES}")
            start += 1


def _records(batch: Any, columns: Sequence[str]) -> Iterator[Record]:
    cells = {name: _values(batch.column(name)) for name in columns}
    for row in range(batch.num_rows):
        values = {name: column[row] for name, column in cells.items()}
        problems = [str(value) for value in values.values() if isinstance(value, _UnreadableError)]
        readable = {name: value for name, value in values.items() if not isinstance(value, _UnreadableError)}
        yield Record(readable, problems[0] if problems else None)


def _values(column: Any) -> list[Any]:
    if not _holds_others_keys(column.type):
        try:
            return cast("list[Any]", column.to_pylist())
        except (ValueError, OverflowError):
            pass  # no UTF-8, or a time that Python has not
    return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return _as_json(scalar.as_py(), scalar.type)
    except UnicodeDecodeError as error:
        return _UnreadableError(f"invalid UTF-8 at byte {error.start}")
    except OverflowError as error:
        return _UnreadableError(f"a value of {scalar.type} that Python cannot hold: {error}")
    except (ValueError, RecursionError) as error:
        what = "malformed JSON" if _holds_others_keys(scalar.type) else f"a value of {scalar.type} that Python cannot hold"
        return _UnreadableError(f"{what}: {error}")


def _holds_others_keys(kind: Any) -> bool:
    return pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)


def _as_json(value: Any, kind: Any) -> Any:
    """The value without the null keys of structs: all rows share a struct's keys, so a row without a key has null there.

    Nulls in lists, in maps and in JSON text stay, for they are the row's own.
    """
    if value is None or not _holds_others_keys(kind):
        return value
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads(value) if kind.extension_name == "arrow.json" else _as_json(value, kind.storage_type)
    if pa.types.is_struct(kind):
        return {field.name: _as_json(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if pa.types.is_map(kind):
        return {key: _as_json(item, kind.item_type) for key, item in value}
    if pa.types.is_union(kind):
        return value
    return [_as_json(item, kind.value_type) for item in value]
