"""A seal: the digest that a whole file carries of itself, in 8 bytes before its footer, where no reader of Parquet looks."""

import xxhash

from m2ray.storage import Data

_SEAL_BYTES = 8


def seal(file: Data) -> bytes:
    """The file with its seal: xxh3-64 of all its other bytes, big-endian."""
    view = memoryview(file)
    at = len(view) - 8 - int.from_bytes(view[-8:-4], "little")
    return b"".join((view[:at], xxhash.xxh3_64_digest(view), view[at:]))


def require_seal(file: Data) -> None:
    """Raise ValueError unless the file is whole and has its seal."""
    view = memoryview(file)
    at = len(view) - 8 - int.from_bytes(view[-8:-4], "little") - _SEAL_BYTES
    if at < 0 or xxhash.xxh3_64_digest(b"".join((view[:at], view[at + _SEAL_BYTES :]))) != view[at : at + _SEAL_BYTES]:
        raise ValueError("its bytes do not have the digest before its footer")
