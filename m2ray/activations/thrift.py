"""A reader of Thrift's compact protocol: what Parquet's footer, page headers and page indexes are written in.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import struct
from typing import Any

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


def read_struct(data: bytes | bytearray | memoryview, start: int = 0) -> tuple[dict[int, Any], int]:
    """The struct that begins at `start`, as its fields by number, and where it ends.

    Raises:
        ValueError: this is no such struct, or it is cut off.
    """
    try:
        return _Reader(data, start).struct()
    except (IndexError, struct.error) as error:
        raise ValueError("a Thrift struct is cut off") from error


class _Reader:
    def __init__(self, data: bytes | bytearray | memoryview, start: int) -> None:
        self._data = data
        self._at = start

    def struct(self) -> tuple[dict[int, Any], int]:
        return self._struct(), self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

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

    def _struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 0x0F
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind in (_TRUE, _FALSE, _BYTE):  # in a list a truth value takes a byte
            return self._byte()
        if kind == _STRUCT:
            return self._struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 0x0F) for _ in range(count)]
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _DOUBLE:
            return struct.unpack("<d", self._bytes(8))[0]
        raise ValueError(f"{kind} is no type of Thrift that Parquet uses")

    def _bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise IndexError
        return bytes(self._data[self._at - count : self._at])
