"""Arguments of tool calls: text in JSON, as OpenAI's API has them, or objects, as most templates want them."""

import json
from collections.abc import Callable
from typing import Any

from m2ray.prompts.rendering import RefusedError
from m2ray.prompts.rows import PromptRow


def with_objects(row: PromptRow) -> PromptRow:
    """The row with each call's arguments as an object. Raises RefusedError for text that is no object in JSON."""
    return _changed(row, _as_object)


def with_texts(row: PromptRow) -> PromptRow:
    """The row with each call's arguments as text; what was text stays as it was written."""
    return _changed(row, _as_text)


def _as_object(arguments: Any, name: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}  # no arguments at all
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RefusedError(f"the arguments of a call of {name!r} are text, and no object in JSON")
    return parsed


def _as_text(arguments: Any, _name: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def _changed(row: PromptRow, change: Callable[[Any, Any], Any]) -> PromptRow:
    messages = [
        {**message, "tool_calls": [_call(call, change) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in row.messages or []
    ]
    return row._replace(messages=messages)


def _call(call: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A call of OpenAI's has a function that holds name and arguments; templates take one without as well."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"], call.get("name"))} if call.get("arguments") is not None else call
