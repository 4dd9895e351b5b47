"""Columns inside of columns, by dotted names: `conversation.messages` is what the objects of `conversation` have as `messages`.

A column whose whole name is that comes first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def dotted(columns: Iterable[str]) -> list[str]:
    """Those of the columns that may lie deeper."""
    return [name for name in columns if "." in name]


def with_nested(values: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """A row with what lies deeper in it under dotted names."""
    nested = {}
    for name in names:
        if name not in values:
            found: Any = values
            *folders, last = name.split(".")
            for folder in folders:
                found = found.get(folder) if isinstance(found, dict) else None
            if isinstance(found, dict) and last in found:
                nested[name] = found[last]
    return {**values, **nested} if nested else values


def fields_of(schema: Any, columns: Iterable[str]) -> list[str]:
    """Those of the columns that an Arrow schema has, dotted ones in its structs."""
    return [name for name in columns if name in schema.names or ("." in name and _has_field(schema, name))]


def chosen(batch: Any, columns: Sequence[str]) -> Any:
    """A record batch of these columns, dotted ones taken out of their structs, where a null has nulls. `fields_of` says which there are."""
    return pa.record_batch([_column(batch, name) for name in columns], names=list(columns))


def kinds_of(schema: Any, columns: Iterable[str]) -> dict[str, Any]:
    """The types of those of the columns that an Arrow schema has, dotted ones in its structs."""
    return {name: schema.field(name).type if name in schema.names else _field_type(schema, name) for name in fields_of(schema, columns)}


def _has_field(schema: Any, name: str) -> bool:
    return _field_type(schema, name) is not None


def _field_type(schema: Any, name: str) -> Any:
    """The type of what lies in structs under a dotted name; None if there is no such field."""
    first, *others = name.split(".")
    if schema.names.count(first) != 1:
        return None
    kind = schema.field(first).type
    for part in others:
        place = kind.get_field_index(part) if pa.types.is_struct(kind) else -1
        if place < 0:
            return None
        kind = kind.field(place).type
    return kind


def _column(batch: Any, name: str) -> Any:
    if name in batch.schema.names:
        return batch.column(name)
    first, *others = name.split(".")
    return pc.struct_field(batch.column(first), others)
