"""What rows of Arrow come to once they are written out, found without making them: one byte of a file may stand for thousands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2ray.batches import Int64Array

_NUMBER_BYTES = 4
"""Of a number, whatever its kind: as token ids count."""

_TYPES = pa.types


def row_sizes(batch: Any, columns: Sequence[str]) -> Mapping[str, Int64Array]:
    """Bytes of each row's value of each column, int64 [rows]. Takes memory for texts in views and for runs, which are written out for it."""
    return {name: _sizes(batch.column(name)) for name in columns}


def _sizes(column: Any) -> Int64Array:
    column = _plain(column)
    for is_kind, sizes_of in _KINDS:
        if is_kind(column.type):
            return sizes_of(column)
    return np.full(len(column), column.get_total_buffer_size(), np.int64)  # unions


def _plain(column: Any) -> Any:
    """The same values in a layout that holds each by itself, but for dictionaries."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.storage)
    if _TYPES.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(column))
    if _TYPES.is_string_view(kind) or _TYPES.is_binary_view(kind):
        return column.cast(pa.large_binary())
    return column


def _nothing(column: Any) -> Int64Array:
    return np.zeros(len(column), np.int64)


def _numbers(column: Any) -> Int64Array:
    return np.full(len(column), _NUMBER_BYTES, np.int64)


def _texts(column: Any) -> Int64Array:
    return _numpy(pc.binary_length(column))


def _chosen(column: Any) -> Int64Array:
    of_values = np.append(_sizes(column.dictionary), 0)  # the last is null's
    return cast("Int64Array", of_values[_numpy(column.indices, len(of_values) - 1)])


def _structs(column: Any) -> Int64Array:
    return sum(map(_sizes, column.flatten()), _nothing(column))


def _lists(column: Any) -> Int64Array:
    offsets = _numpy(column.offsets)
    if _TYPES.is_primitive(column.type.value_type):
        return np.diff(offsets) * _NUMBER_BYTES
    return _summed(_sizes(column.values), offsets)


def _views(column: Any) -> Int64Array:
    """Lists of which several may be made of the same elements."""
    sums = np.append(0, np.cumsum(_sizes(column.values) + _NUMBER_BYTES))
    begins = _numpy(column.offsets)
    return np.where(column.is_valid().to_numpy(zero_copy_only=False), sums[begins + _numpy(column.sizes)] - sums[begins], 0)


def _maps(column: Any) -> Int64Array:
    return _summed(_sizes(column.keys) + _sizes(column.items), _numpy(column.offsets))


def _fixed_lists(column: Any) -> Int64Array:
    width = column.type.list_size
    return _summed(_sizes(column.values), (column.offset + np.arange(len(column) + 1)) * width)


def _summed(sizes: Int64Array, offsets: Int64Array) -> Int64Array:
    """Those of lists whose elements have `sizes`; an element takes some itself."""
    return np.diff(np.append(0, np.cumsum(sizes + _NUMBER_BYTES))[offsets])


def _numpy(numbers: Any, null: int = 0) -> Int64Array:
    return cast("Int64Array", numbers.fill_null(null).to_numpy(zero_copy_only=False).astype(np.int64))


def _is_text(kind: Any) -> bool:
    return bool(_TYPES.is_string(kind) or _TYPES.is_large_string(kind) or _TYPES.is_binary(kind) or _TYPES.is_large_binary(kind))


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Int64Array]], ...] = (
    (_is_text, _texts),
    (_TYPES.is_null, _nothing),
    (_TYPES.is_primitive, _numbers),
    (_TYPES.is_dictionary, _chosen),
    (_TYPES.is_struct, _structs),
    (_TYPES.is_map, _maps),
    (lambda kind: _TYPES.is_list(kind) or _TYPES.is_large_list(kind), _lists),
    (_TYPES.is_fixed_size_list, _fixed_lists),
    (lambda kind: _TYPES.is_list_view(kind) or _TYPES.is_large_list_view(kind), _views),
)
