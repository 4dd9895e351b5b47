"""The JSON records of a run, and the digest of itself that each carries since format 2: a record whose bits changed is refused by name."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from pydantic import TypeAdapter, ValidationError

from m2ray.activations.schema import FORMAT_VERSION
from m2ray.errors import RunConflictError, RunDamagedError
from m2ray.storage import Store

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_SEALED = re.compile(rb',"digest":"([0-9a-f]{32})"}\Z')
"""How a record without indentation ends. What stands before is what its digest is of."""


def to_json(record: "DataclassInstance", indent: int | None = None) -> bytes:
    """The record's bytes, its digest last."""
    fields = json.loads(json.dumps(asdict(record)))
    if fields["format_version"] == 1:
        return json.dumps(fields, indent=indent).encode()
    if indent is None:
        data = _canonical(fields)
        return b'%b,"digest":"%b"}' % (data[:-1], xxhash.xxh3_128_hexdigest(data).encode())
    return json.dumps(fields | {"digest": digest(fields)}, indent=indent).encode()


def digest(fields: dict[str, Any]) -> str:
    """xxh3-128 of all fields but `digest`, as JSON with sorted keys, without spaces and in ASCII: 32 hex digits."""
    others = {name: value for name, value in fields.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(_canonical(others))


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def is_sealed(data: bytes) -> bool:
    """Whether these are the bytes that `to_json` wrote without indentation, which is found without taking them apart."""
    found = _SEALED.search(data, len(data) - 46)
    return found is not None and xxhash.xxh3_128_hexdigest(data[: found.start()] + b"}").encode() == found[1]


def read_record(store: Store, key: str, adapter: TypeAdapter[T], as_now: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> T:
    """A JSON object of the run, validated.

    Args:
        as_now: makes of an object that an earlier version of the format wrote what it would be now.

    Raises:
        RunConflictError: a newer m2ray wrote it.
        RunDamagedError: it is not what m2ray writes, or not what was written.
        StoreError: it cannot be read.
    """
    data = store.read(key)
    try:
        if is_sealed(data):
            with suppress(ValidationError):  # a newer format's fields may be others
                record = adapter.validate_json(data, strict=True)
                if vars(record)["format_version"] <= FORMAT_VERSION:
                    return record
        fields = json.loads(data)
        version = fields["format_version"]
        if version <= FORMAT_VERSION:
            if version < 1 or ((version > 1 or "digest" in fields) and fields["digest"] != digest(fields)):
                raise ValueError("it does not have the digest that it names")
            return adapter.validate_json(data if as_now is None else json.dumps(as_now(fields)), strict=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunDamagedError(
            f"{key} of the run at {store.url} is damaged: {_reason(error)}.", "Restore it, or begin another run."
        ) from error
    raise RunConflictError(
        f"{key} of the run at {store.url} has format {version}; this m2ray knows formats up to {FORMAT_VERSION}.", "Upgrade m2ray."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
    return f"{error} is absent" if isinstance(error, KeyError) else str(error)
