"""PromptRow: one row of the source, checked: a text, or chat messages, or the reason why it is neither."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

MAX_PROMPT_BYTES = 16 << 20
"""Longer rows are quarantined unread: tokenising one takes about a hundred bytes of memory for each of its bytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file format makes of one row: its columns, or the problem that keeps them from being trusted."""

    values: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Where one file keeps its prompts. `prompt` holds chat messages if `is_messages`, else text."""

    prompt: str
    is_messages: bool
    row_id: str | None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row. Exactly one of `text`, `messages` and `reason` (why it is quarantined) is given.

    `sequence_id` is its 0-based place in the source, over all files; `row_id` the value of the id column, else that place.
    """

    sequence_id: int
    row_id: str
    text: str | None = None
    messages: list[Message] | None = None
    reason: str | None = None


def as_row(record: Record, sequence_id: int, columns: Columns) -> PromptRow:
    """Check a record. It never raises: whatever is wrong with the row becomes its `reason`."""
    row_id = _row_id(record, sequence_id, columns)
    problem = record.problem
    if problem is None and columns.prompt not in record.values:
        problem = f"no column {columns.prompt!r}"
    if problem is not None:
        return PromptRow(sequence_id, row_id, reason=problem)
    value = record.values[columns.prompt]
    if not columns.is_messages:
        problem = _text_problem(value)
        return PromptRow(sequence_id, row_id, reason=problem) if problem else PromptRow(sequence_id, row_id, text=value)
    messages, problem = _read_messages(value)
    return PromptRow(sequence_id, row_id, reason=problem) if problem else PromptRow(sequence_id, row_id, messages=messages)


def _row_id(record: Record, sequence_id: int, columns: Columns) -> str:
    value = record.values.get(columns.row_id) if columns.row_id is not None else None
    if value is None:
        return str(sequence_id)
    # Bytes that are no UTF-8 arrive as lone surrogates, which no file could store.
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _text_problem(value: Any) -> str | None:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"not a string but {type(value).__name__}"
    return "empty" if not value or value.isspace() else _unicode_problem(value)


def _unicode_problem(text: str) -> str | None:
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return f"invalid Unicode: a lone surrogate at character {error.start}"
    return f"{num_bytes} bytes, more than {MAX_PROMPT_BYTES}" if num_bytes > MAX_PROMPT_BYTES else None


def _read_messages(value: Any) -> tuple[list[Message], str | None]:
    """The messages without their null keys, which Parquet and Arrow add, or the problem. A string is parsed as JSON (CSV)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [], "messages are neither a list nor a list in JSON"
    if value is None:
        return [], "null"
    if not isinstance(value, list):
        return [], f"messages are not a list but {type(value).__name__}"
    messages: list[Message] = []
    for number, item in enumerate(value):
        problem = _message_problem(item)
        if problem:
            return [], f"message {number}: {problem}"
        messages.append({key: part for key, part in item.items() if part is not None})
    if all(message["content"].isspace() or not message["content"] for message in messages):
        return [], "empty"
    return messages, _unicode_problem(json.dumps(messages, ensure_ascii=False, default=str))


def _message_problem(item: Any) -> str | None:
    if not isinstance(item, dict):
        return f"not an object with role and content but {type(item).__name__}"
    for key in ("role", "content"):
        if key not in item:
            return f"no {key!r}"
        if not isinstance(item[key], str):
            return f"{key!r} is not a string but {type(item[key]).__name__}"
    return None if item["role"] else "'role' is empty"
