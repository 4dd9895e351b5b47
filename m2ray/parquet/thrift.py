"""Thrift's compact protocol, read and written: what Parquet's footer, page headers and page indexes are made of.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import struct
from dataclasses import dataclass
from typing import Any, Union

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)

BOOL, I16, I32, I64, BINARY = _TRUE, _I16, _I32, _I64, _BINARY

Type = Union[int, "List", "Struct"]
"""BOOL, I16, I32, I64, BINARY (values are bytes), a list or a struct."""


@dataclass(frozen=True)
class List:
    """A list of values of one type, none of them a truth value."""

    of: Type


class Struct:
    """A struct by its fields. Its values are dicts by the fields' names, where what is absent is not set.

    Args:
        fields: number and type of each name, by ascending numbers.
    """

    def __init__(self, **fields: tuple[int, Type]) -> None:
        self.fields = fields
        self.names = {number: (name, type_) for name, (number, type_) in fields.items()}
        self._numbers = {name: number for name, (number, _) in fields.items()}

    def read(self, data: bytes | bytearray | memoryview, start: int = 0) -> tuple[dict[str, Any], int]:
        """The struct that begins at `start`, and where it ends. Fields of other numbers are left out.

        Raises:
            ValueError: this is no such struct, or it is cut off.
        """
        reader = _Reader(data, start)
        try:
            return reader.struct(self), reader.at
        except (IndexError, struct.error) as error:
            raise ValueError("a Thrift struct is cut off") from error
        except RecursionError as error:
            raise ValueError("a Thrift struct holds itself without end") from error

    def write(self, values: dict[str, Any]) -> bytes:
        """The struct's bytes. Raises KeyError at a name that it does not have."""
        written = bytearray()
        self.write_into(written, values)
        return bytes(written)

    def write_into(self, written: bytearray, values: dict[str, Any]) -> None:
        """Append the struct's bytes. Raises KeyError at a name that it does not have."""
        before = 0
        for name in sorted(values, key=self._numbers.__getitem__):
            number, type_ = self.fields[name]
            value = values[name]
            code = (_TRUE if value else _FALSE) if type_ == BOOL else _code(type_)
            if number - before < 16:
                written.append((number - before) << 4 | code)
            else:
                written.append(code)
                _write_zigzag(written, number)
            if type_ != BOOL:
                _write_value(written, type_, value)
            before = number
        written.append(_STOP)


def _code(type_: Type) -> int:
    """How a type is named ahead of its values."""
    if isinstance(type_, int):
        return type_
    return _LIST if isinstance(type_, List) else _STRUCT


def _write_value(written: bytearray, type_: Type, value: Any) -> None:
    if isinstance(type_, Struct):
        type_.write_into(written, value)
    elif isinstance(type_, List):
        code = _code(type_.of)
        if len(value) < 15:
            written.append(len(value) << 4 | code)
        else:
            written.append(15 << 4 | code)
            _write_varint(written, len(value))
        for each in value:
            _write_value(written, type_.of, each)
    elif type_ == BINARY:
        _write_varint(written, len(value))
        written += value
    else:
        _write_zigzag(written, value)


def _write_varint(written: bytearray, number: int) -> None:
    while number >= 0x80:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)


def _write_zigzag(written: bytearray, number: int) -> None:
    _write_varint(written, number << 1 if number >= 0 else (-number << 1) - 1)


class _Reader:
    def __init__(self, data: bytes | bytearray | memoryview, start: int) -> None:
        self._data = data
        self.at = start

    def struct(self, wanted: Struct | None) -> dict[str, Any]:
        """The fields that are wanted; of None, none."""
        fields: dict[str, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            code = head & 0x0F
            name, type_ = (wanted.names if wanted else {}).get(number, ("", None))
            if type_ is not None and _code(type_) != (BOOL if code == _FALSE else code):
                raise ValueError(f"{name} has another type than it should")
            value = code == _TRUE if code in (_TRUE, _FALSE) else self._value(code, type_)
            if type_ is not None:
                fields[name] = value
        return fields

    def _value(self, code: int, type_: Type | None) -> Any:
        if code in (_I16, _I32, _I64):
            return self._zigzag()
        if code in (_TRUE, _FALSE, _BYTE):  # in a list a truth value takes a byte
            return self._byte()
        if code == _STRUCT:
            return self.struct(type_ if isinstance(type_, Struct) else None)
        if code in (_LIST, _SET):
            return self._list(type_.of if isinstance(type_, List) else None)
        if code == _BINARY:
            return self._bytes(self._varint())
        if code == _DOUBLE:
            return struct.unpack("<d", self._bytes(8))[0]
        raise ValueError(f"{code} is no type of Thrift that Parquet uses")

    def _list(self, type_: Type | None) -> list[Any]:
        head = self._byte()
        count, code = self._varint() if head >> 4 == 15 else head >> 4, head & 0x0F
        if type_ is not None and count and _code(type_) != code:
            raise ValueError("a list holds values of another type than it should")
        return [self._value(code, type_) for _ in range(count)]

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        number, shift = 0, 0
        while True:
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    def _zigzag(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self._data):
            raise IndexError
        return bytes(self._data[self.at - count : self.at])
