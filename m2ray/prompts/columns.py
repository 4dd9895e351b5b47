"""Which column of the source holds the prompts, text or chat messages: chosen once, for all its files."""

import json
from collections.abc import Iterable, Sequence

from m2ray.errors import PromptsError
from m2ray.prompts.options import PromptOptions
from m2ray.prompts.readers import PromptFile
from m2ray.prompts.rows import Columns, FileColumns

TEMPLATE_OPTIONS = "chat_template_kwargs"
"""The column whose objects a row's chat template gets as options, by the name that vLLM and TRL give it."""

_TEXT, _MESSAGES, _TOOLS = "text", "messages", "tools"


def choose_columns(files: Sequence[tuple[PromptFile, FileColumns]], options: PromptOptions) -> Columns:
    """The one column of all files: the one that the options name, else "text" or "messages", whichever is there.

    Raises:
        PromptsError: both are there or named, or an option of chats is given beside texts.
    """
    if options.text_column and options.messages_column:
        raise PromptsError(
            f"text_column = {options.text_column!r} and messages_column = {options.messages_column!r} are both given, "
            "and a run's prompts come from one column.",
            "Leave one of them out.",
        )
    named = options.text_column or options.messages_column
    if named is None:
        _refuse_both(files)
    is_messages = bool(options.messages_column) or (named is None and any(present and _MESSAGES in present for _, present in files))
    of_chats = {"tools_column": options.tools_column, "add_generation_prompt": options.add_generation_prompt}
    given = ", ".join(f"{name} = {json.dumps(value)}" for name, value in of_chats.items() if value)
    if given and not is_messages:
        raise PromptsError(
            f"{given} is given, but the prompts are texts, which no chat template is applied to.",
            "Leave it out, or set messages_column.",
        )
    return Columns(
        prompt=named or (_MESSAGES if is_messages else _TEXT),
        is_messages=is_messages,
        row_id=options.id_column,
        tools=(options.tools_column or _TOOLS) if is_messages else None,
        template_options=TEMPLATE_OPTIONS if is_messages else None,
        rival=None if named else (_TEXT if is_messages else _MESSAGES),
    )


def absent_columns(file: PromptFile, present: FileColumns, columns: Columns, options: PromptOptions) -> list[PromptsError]:
    """What a file lacks of the columns that were chosen and named.

    One that shows no columns has no row to tell from: there is none, or they are quarantined one by one.
    """
    needed = {"id_column": columns.row_id, "tools_column": options.tools_column}
    if present is None:
        needed["messages_column"] = columns.prompt if columns.is_messages else None
        return [
            PromptsError(f"{file.path} is plain text and has no column {name!r}.", f"Leave {option} out, or the file.")
            for option, name in needed.items()
            if name is not None
        ]
    if not present:
        return []
    listed = ", ".join(repr(name) for name in sorted(present))
    problems = [
        PromptsError(f"{file.path} has no column {name!r}.", f"Set {option} to one of its columns: {listed}.")
        for option, name in needed.items()
        if name is not None and name not in present
    ]
    if columns.prompt not in present:
        lacks_both = columns.rival is not None and columns.rival not in present
        either = f"neither a column {_TEXT!r} nor {_MESSAGES!r}" if lacks_both else f"no column {columns.prompt!r}"
        problems.append(PromptsError(f"{file.path} has {either}.", f"Set text_column or messages_column to one of its columns: {listed}."))
    return problems


def _refuse_both(files: Iterable[tuple[PromptFile, FileColumns]]) -> None:
    seen: dict[str, str] = {}
    for file, present in files:
        for name in (_TEXT, _MESSAGES):
            if present is not None and name in present:
                seen.setdefault(name, f"{name!r} (first in row {present[name]} of {file.name})")
            elif present is None and name == _TEXT:
                seen.setdefault(name, f"{name!r} (the lines of {file.name})")
    if len(seen) == 2:
        raise PromptsError(
            f"The prompts have two columns, and one of them must count for all rows: {seen[_TEXT]} and {seen[_MESSAGES]}.",
            'Set text_column = "text" or messages_column = "messages". Rows without that column are then quarantined, files without it refused.',
        )
