"""Kept columns: those of the prompts that travel into `sequences/` with the types that they have, as the option `keep_columns` names them."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from m2ray.errors import PromptsError, raise_all
from m2ray.sequences import SEQUENCES_SCHEMA

if TYPE_CHECKING:
    from m2ray.prompts.readers import PromptFile

_TYPES = pa.types
_SCALAR_BYTES = 8
_NOTHING: tuple[tuple[Any, ...], None, int] = ((), None, 0)
_SHORT = {pa.string_view(): pa.string(), pa.large_string(): pa.string(), pa.binary_view(): pa.binary(), pa.large_binary(): pa.binary()}


class KeptColumns(NamedTuple):
    """Columns by their names with their Arrow types. A tuple, since every row asks."""

    names: tuple[str, ...] = ()
    types: tuple[Any, ...] = ()

    @property
    def schema(self) -> Any:
        """They as a pyarrow schema."""
        return pa.schema(list(zip(self.names, self.types, strict=True)))

    def of(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], str | None, int]:
        """A row's values of these columns, null where it has none; what keeps one of them from its column, if anything; and their bytes."""
        if not self.names:
            return _NOTHING
        cells: list[Any] = []
        problem, num_bytes = None, 0
        for name, kind in zip(self.names, self.types, strict=True):
            cell = values.get(name)
            try:
                is_whole = _is_same(cell, pa.scalar(cell, kind).as_py())
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                is_whole = False
            if not is_whole:
                problem = problem or f"{name}: {shortened(cell)} is not {kind}, as those of the column are"
                cell = None
            cells.append(cell)
            num_bytes += len(str(cell)) if isinstance(cell, str | bytes | list | dict) else _SCALAR_BYTES
        return tuple(cells), problem, num_bytes

    def as_read(self, cells: Sequence[Any]) -> dict[str, Any]:
        """A row's values, as `of` gives them, in the way that `sequences/` gives them again. None of a context, which has no row."""
        return {name: pa.scalar(cell, kind).as_py() for name, kind, cell in zip(self.names, self.types, cells, strict=False)}


def kept_columns(files: Iterable["PromptFile"], names: Sequence[str]) -> KeptColumns:
    """The columns of these names, each of one type in all files that have it: numbers of several kinds become the widest.

    Raises:
        PromptsError: all at once: a name that `sequences/` has itself or that stands twice, a type that cannot be kept, or files that differ in it.
    """
    problems = [
        PromptsError(f"keep_columns: {name!r} is a column that m2ray writes itself.", "Rename the column of the prompts.")
        for name in names
        if name in SEQUENCES_SCHEMA.names
    ]
    problems += [PromptsError(f"keep_columns names {name!r} twice.") for name in dict.fromkeys(names) if names.count(name) > 1]
    found: dict[str, Any] = {}
    for file in files if names else ():
        for name, kind in file.kinds(names).items():
            try:
                field = pa.field(name, _keepable(plain_type(kind)))
                schemas = [pa.schema([found.get(name, field)]), pa.schema([field])]
                found[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0)
            except (pa.ArrowException, ValueError) as error:
                problems.append(
                    PromptsError(
                        f"keep_columns: {name!r} of {file.path} cannot be kept: {error}.",
                        "Give it one type in all files, text for one, or leave it out.",
                    )
                )
    raise_all(problems)
    return KeptColumns(tuple(names), tuple(found[name].type if name in found else pa.null() for name in names))


def kind_of_values(values: Sequence[Any]) -> Any:
    """The Arrow type of JSON's values. Raises pa.ArrowException, ValueError or OverflowError where they have none in common."""
    return pa.array(values).type


def plain_type(kind: Any) -> Any:
    """The type of the same values, each by itself: one for all layouts of text, bytes and lists."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if _TYPES.is_dictionary(kind) or _TYPES.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if _TYPES.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if _TYPES.is_list(kind) or _TYPES.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return _SHORT.get(kind, kind)


def _is_same(given: Any, held: Any) -> bool:
    """Whether a column's type holds all of a value: Arrow cuts 1.5 to 1 for whole numbers, and leaves out keys that a struct has not."""
    if isinstance(given, Mapping):
        return isinstance(held, Mapping) and all(_is_same(value, held.get(name)) for name, value in given.items())
    if isinstance(given, list):
        return isinstance(held, list) and len(given) == len(held) and all(map(_is_same, given, held))
    if isinstance(held, bytes):  # files with text, and others with bytes
        return held == (given.encode() if isinstance(given, str) else given)
    if isinstance(given, bool) != isinstance(held, bool):
        return False
    return bool(given == held) or (isinstance(given, float) and isnan(given))


def _keepable(kind: Any) -> Any:
    """A plain type. Raises ValueError for one whose values rows do not give back as they were, or that Parquet has not."""
    is_lost = kind == pa.time64("ns") or _TYPES.is_map(kind) or _TYPES.is_union(kind) or _TYPES.is_list_view(kind)
    is_no_parquet = _TYPES.is_interval(kind) or (_TYPES.is_struct(kind) and not kind.num_fields)
    if is_lost or is_no_parquet or _TYPES.is_large_list_view(kind):
        raise ValueError(f"it is of the type {kind}")
    for place in range(kind.num_fields):
        _keepable(kind.field(place).type)
    return kind


def shortened(value: Any) -> str:
    """A value as Python writes it, without its end where that is long."""
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:60]}..."
