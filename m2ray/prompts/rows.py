"""PromptRow: one row of the source, checked: a text, or chat messages, or the reason why it is neither."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from m2ray.prompts.kept import KeptColumns

Message = dict[str, Any]

Kind = Literal["text", "messages", "input_ids"]
"""What a prompt is given as."""

MAX_PROMPT_BYTES = 2 << 20
"""Longer rows are quarantined unread, and so many bytes are tokenised at a time: it takes up to 230 bytes of memory for each."""

LOSS_MASKS = ("loss_mask", "assistant_masks")
"""The columns that are looked for beside token ids; transformers and TRL write the second name."""

_ROW_ID_CHARACTERS = 256
_NONE_KEPT = KeptColumns()

_SPEAKERS = {"human": "user", "gpt": "assistant"}
_ID_BYTES = 4
_LARGEST_ID = 2**31 - 1


class Record(NamedTuple):
    """What a file format makes of one row: its columns, or the problem that keeps them from being trusted."""

    values: Mapping[str, Any]
    problem: str | None = None


FileColumns = Mapping[str, int] | None
"""A file's columns, each with the first row that has it; None for plain text, which is a text column of any name."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the prompts are, and of which kind they are.

    `tools` and `template_options` go with messages, `attention_mask` and `loss_mask` with input_ids, where a file has them.
    `rivals` are the columns that no row may have beside or instead of `prompt`; none if the user named `prompt`. `kept` are those that travel
    into `sequences/`.
    """

    prompt: str
    kind: Kind = "text"
    row_id: str | None = None
    tools: str | None = None
    template_options: str | None = None
    attention_mask: str | None = None
    loss_mask: str | None = None
    rivals: frozenset[str] = frozenset()
    kept: KeptColumns = _NONE_KEPT

    def __str__(self) -> str:
        what = {"text": "text", "messages": "chat messages", "input_ids": "token ids"}
        return f"{what[self.kind]} of the column {self.prompt!r}"

    @property
    def is_messages(self) -> bool:
        return self.kind == "messages"

    def of(self, present: FileColumns) -> list[str]:
        """Those that are to be read of a file, the prompt first; dotted ones whether it shows them or not."""
        others = (self.row_id, self.tools, self.template_options, self.attention_mask, self.loss_mask, *self.kept.names)
        found = (name for name in others if name is not None and (present is None or name in present or "." in name))
        return list(dict.fromkeys([self.prompt, *found]))


class PromptRow(NamedTuple):
    """One row (a tuple, because there are millions: a frozen dataclass takes four times as long to make). Exactly one of `text`, `messages`, `token_ids` and `reason` (why it is quarantined) is given.

    `sequence_id` is its 0-based place in the source, over all files; `row_id` the value of the id column, else that place.
    `tools` and `template_options` go with messages, to the chat template. `loss_mask`, one byte 0 or 1 a token, goes with `token_ids`.
    `kept` are the values of the kept columns, in their order, of a quarantined row too. `num_bytes` is what all of it takes as UTF-8.
    """

    sequence_id: int
    row_id: str
    text: str | None = None
    messages: list[Message] | None = None
    token_ids: list[int] | None = None
    reason: str | None = None
    tools: list[Any] | None = None
    template_options: Mapping[str, Any] | None = None
    loss_mask: bytes | None = None
    num_bytes: int = 0
    kept: tuple[Any, ...] = ()


class _BadRowError(ValueError):
    """The reason why a row is quarantined."""


def as_row(record: Record, sequence_id: int, columns: Columns) -> PromptRow:
    """Check a record. It never raises: whatever is wrong with the row becomes its `reason`."""
    row_id = _row_id(record, sequence_id, columns)
    kept, misfit, kept_bytes = columns.kept.of(record.values)
    if len(row_id) > _ROW_ID_CHARACTERS:
        reason = f"its id has {len(row_id)} characters, more than {_ROW_ID_CHARACTERS}"
        return PromptRow(sequence_id, row_id[:_ROW_ID_CHARACTERS], reason=reason, kept=kept)
    try:
        if (problem := record.problem or misfit) is not None:
            raise _BadRowError(problem)
        if columns.prompt not in record.values:
            raise _BadRowError(f"no column {columns.prompt!r}")
        row = PromptRow(sequence_id, row_id, kept=kept, **_READERS[columns.kind](record.values, columns))
        return row._replace(num_bytes=row.num_bytes + kept_bytes) if kept_bytes else row
    except _BadRowError as error:
        return PromptRow(sequence_id, row_id, reason=str(error), kept=kept)


def _row_id(record: Record, sequence_id: int, columns: Columns) -> str:
    value = record.values.get(columns.row_id) if columns.row_id is not None else None
    if value is None:
        return str(sequence_id)
    # Bytes that are no UTF-8 arrive as lone surrogates, which no file could store.
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _read_text(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    text = values[columns.prompt]
    if text is None:
        raise _BadRowError("null")
    if not isinstance(text, str):
        raise _BadRowError(f"not a string but {type(text).__name__}")
    if not text or text.isspace():
        raise _BadRowError("empty")
    return {"text": text, "num_bytes": _num_bytes(text)}


def _read_chat(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    chat = {
        "messages": _read_messages(values[columns.prompt]),
        "tools": _read_tools(values.get(columns.tools or ""), columns.tools),
        "template_options": _read_template_options(values.get(columns.template_options or ""), columns.template_options),
    }
    try:
        return {**chat, "num_bytes": _num_bytes(json.dumps(chat, ensure_ascii=False, default=str))}
    except (TypeError, RecursionError) as error:
        raise _BadRowError(f"no JSON: {error}") from error


def _num_bytes(text: str) -> int:
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _BadRowError(f"invalid Unicode: a lone surrogate at character {error.start}") from error
    if num_bytes > MAX_PROMPT_BYTES:
        raise _BadRowError(f"{num_bytes} bytes, more than {MAX_PROMPT_BYTES}")
    return num_bytes


def _read_messages(value: Any) -> list[Message]:
    """The messages without their null keys, which Parquet and Arrow add, and which transformers leaves out too."""
    value = _parsed(value, "messages", "list")
    if value is None:
        raise _BadRowError("null")
    if not isinstance(value, list):
        raise _BadRowError(f"messages are not a list but {type(value).__name__}")
    messages: list[Message] = []
    for number, given in enumerate(value):
        item = _with_one_content(_without_sharegpt(given), number)
        problem = _message_problem(item)
        if problem:
            raise _BadRowError(f"message {number}: {problem}")
        messages.append({key: part for key, part in item.items() if part is not None})
    if all(_says_nothing(message) for message in messages):
        raise _BadRowError("empty")
    return messages


def _without_sharegpt(item: Any) -> Any:
    """A message of ShareGPT's, {"from": "human", "value": ...}, with the names that templates know; any other as it is."""
    if not isinstance(item, dict) or item.get("from") is None or item.get("role") is not None:
        return item
    others = {key: part for key, part in item.items() if key not in ("from", "value", "role", "content")}
    speaker = item["from"]
    return {"role": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": item.get("value"), **others}


def _with_one_content(item: Any, number: int) -> Any:
    """A message whose content is a list of text parts with their texts as one string; any other as it is."""
    if not isinstance(item, dict) or not isinstance(item.get("content"), list):
        return item
    texts = []
    for place, part in enumerate(item["content"]):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise _BadRowError(f"message {number}: content part {place} is of type {kind!r}, and m2ray runs text alone")
        if not isinstance(part.get("text"), str):
            raise _BadRowError(f"message {number}: the text of content part {place} is not a string but {type(part.get('text')).__name__}")
        texts.append(part["text"])
    return {**item, "content": "".join(texts)}


def _message_problem(item: Any) -> str | None:
    if not isinstance(item, dict):
        return f"not an object with role and content but {type(item).__name__}"
    # A message that calls tools need not say anything: its content is null or absent.
    for key in ("role",) if item.get("tool_calls") and item.get("content") is None else ("role", "content"):
        if key not in item:
            return f"no {key!r}"
        if not isinstance(item[key], str):
            return f"{key!r} is not a string but {type(item[key]).__name__}"
    return None if item["role"] else "'role' is empty"


def _says_nothing(message: Message) -> bool:
    return not message.get("tool_calls") and (not message["content"] or message["content"].isspace())


def _read_tools(value: Any, column: str | None) -> list[Any] | None:
    tools = _parsed(value, column, "list")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise _BadRowError(f"{column} are not a list but {type(tools).__name__}")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise _BadRowError(f"{column}: tool {number} is not an object but {type(tool).__name__}")
    return tools


def _read_template_options(value: Any, column: str | None) -> Mapping[str, Any] | None:
    options = _parsed(value, column, "object")
    if options is not None and not isinstance(options, dict):
        raise _BadRowError(f"{column} is not an object but {type(options).__name__}")
    return options


def _parsed(value: Any, name: str | None, wanted: str) -> Any:
    """A string is parsed as JSON: what CSV holds, and columns of tools whose schemas differ. An empty one, as CSV has it, is null."""
    if not isinstance(value, str):
        return value
    if not value:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _BadRowError(f"{name} are neither a {wanted} nor a {wanted} in JSON") from error


# -- token ids ------------------------------------------------------------------------------------------------------------


def _read_token_ids(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The ids and their loss mask without the padding at one end that `attention_mask` marks."""
    token_ids = _integers(values[columns.prompt], columns.prompt, _LARGEST_ID)
    if token_ids is None:
        raise _BadRowError("null")
    for name in LOSS_MASKS:  # as the columns were chosen, by the first rows, nobody would read the other one
        if name != columns.loss_mask and "." not in (columns.loss_mask or "") and values.get(name) is not None:
            raise _BadRowError(
                f"its loss mask is in {name!r}, and those of the rows before, if they have any, are in {columns.loss_mask!r}"
            )
    loss_mask = _mask(values.get(columns.loss_mask or ""), columns.loss_mask, len(token_ids), columns.prompt)
    attention_mask = _mask(values.get(columns.attention_mask or ""), columns.attention_mask, len(token_ids), columns.prompt)
    kept = _unpadded(attention_mask, columns.attention_mask) if attention_mask is not None else slice(None)
    token_ids = token_ids[kept]
    if not token_ids:
        raise _BadRowError("empty")
    num_bytes = _ID_BYTES * len(token_ids)
    if num_bytes > MAX_PROMPT_BYTES:
        raise _BadRowError(f"{num_bytes} bytes, more than {MAX_PROMPT_BYTES}")
    return {"token_ids": token_ids, "loss_mask": None if loss_mask is None else bytes(loss_mask[kept]), "num_bytes": num_bytes}


def _integers(value: Any, name: str, largest: int) -> list[int] | None:
    numbers = _parsed(value, name, "list")
    if numbers is None:
        return None
    if not isinstance(numbers, list):
        raise _BadRowError(f"{name} are not a list but {type(numbers).__name__}")
    for place, number in enumerate(numbers):
        if type(number) is not int or not 0 <= number <= largest:
            raise _BadRowError(f"{name}: {number!r} at place {place} is not a whole number from 0 to {largest}")
    return numbers


def _mask(value: Any, name: str | None, num_tokens: int, prompt: str) -> list[int] | None:
    mask = _integers([int(one) if isinstance(one, bool) else one for one in value] if isinstance(value, list) else value, str(name), 1)
    if mask is not None and len(mask) != num_tokens:
        raise _BadRowError(f"{name} has {len(mask)} entries for the {num_tokens} of {prompt}")
    return mask


def _unpadded(mask: list[int], name: str | None) -> slice:
    """The tokens that the mask keeps: all but some at one end."""
    if 1 not in mask:
        return slice(0)
    first, stop = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:stop] or (first > 0 and stop < len(mask)):
        raise _BadRowError(f"{name} marks more than padding at one end")
    return slice(first, stop)


_READERS: dict[Kind, Callable[[Mapping[str, Any], Columns], dict[str, Any]]] = {
    "text": _read_text,
    "messages": _read_chat,
    "input_ids": _read_token_ids,
}
