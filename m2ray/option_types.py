"""The types of options: what each takes from a TOML file or a flag, and its legal values in words."""

import codecs
import json
from datetime import date
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from m2ray.errors import M2rayError
from m2ray.option_text import parse_sites


def as_object(value: Any) -> Any:
    """A flag's JSON text as what it says; any other value as it is. Raises ValueError for what JSON cannot say: TOML's dates, infinities."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"JSON, where a date is text: {error}") from error
    return value


def _names(value: Any) -> Any:
    """A flag's "label, topic" as its names; a list as it is."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _encoding(value: Any) -> str:
    """Python's own name of a text encoding. Raises ValueError for a name that is none."""
    try:
        "".encode(str(value))
        return codecs.lookup(str(value)).name
    except (LookupError, ValueError) as error:
        raise ValueError("the name of a text encoding, as Python has them") from error


def _day(value: Any) -> date:
    """Raises ValueError for what is no date of ISO 8601."""
    try:
        return date.fromisoformat(str(value))
    except ValueError as error:
        raise ValueError("a date such as 2026-02-28") from error


def _sites(text: str) -> str:
    """Raises ValueError for what names no sites."""
    try:
        parse_sites(text)
    except M2rayError as error:
        raise ValueError(f"a list of sites: {' '.join(str(error).split())}") from error
    return text


def _number(value: Any) -> Any:
    """Anything but TOML's true and false, which are 1 and 0 to Python. Raises ValueError for these."""
    if isinstance(value, bool):
        raise ValueError("a number")  # noqa: TRY004 - pydantic's own word for what a validator refuses
    return value


Number = BeforeValidator(_number)
"""Beside the bounds of an option that is a number."""

Auto = Literal["auto"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]
Weights = Literal["auto", "bf16", "packed"]
OffloadTo = Literal["none", "cpu", "disk", "auto"]
Transport = Literal["auto", "object_store", "cuda_ipc"]
Positive = Annotated[int, Field(gt=0, lt=1 << 63), Number]
Threads = Annotated[int, Field(gt=0, le=4096), Number]
Seconds = Annotated[float, Field(gt=0, le=1_000_000), Number]
"""Of a wait: up to eleven days, since the system counts a poll's milliseconds by 31 bits."""

Day = Annotated[date, BeforeValidator(_day)]
NonEmpty = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Sites = Annotated[NonEmpty, AfterValidator(_sites)]
Encoding = Annotated[str, BeforeValidator(_encoding)]
Names = Annotated[tuple[NonEmpty, ...], Field(min_length=1), BeforeValidator(_names)]

_OPEN = {int: "NUMBER", float: "NUMBER", str: "TEXT", date: "DATE", tuple: "NAMES"}


def legal_values(annotation: Any) -> list[str]:
    """What an option of this type may be: each value as it is written, or a word in capitals that stands for many."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [value for member in get_args(annotation) if member is not NoneType for value in legal_values(member)]
    if get_origin(annotation) is Annotated:
        return legal_values(get_args(annotation)[0])
    return [_OPEN.get(get_origin(annotation) or annotation, "JSON")]
