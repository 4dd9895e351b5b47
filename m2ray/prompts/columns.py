"""Which column of the source holds the prompts, text, chat messages or token ids: chosen once, for all its files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts.kept import kept_columns
from m2ray.prompts.readers import PromptFile
from m2ray.prompts.rows import LOSS_MASKS, Columns, FileColumns, Kind, Record
from m2ray.storage import without_secrets

TEMPLATE_OPTIONS = "chat_template_kwargs"
"""The column whose objects a row's chat template gets as options, by the name that vLLM and TRL give it."""

NAME_ONE = (
    "Name the one that counts: text_column, messages_column or input_ids_column. Rows without that column are then quarantined, "
    "files without it refused."
)

_SHOWN_NESTED = 20

_DEFAULTS: dict[str, Kind] = {"text": "text", "messages": "messages", "conversations": "messages", "input_ids": "input_ids"}
"""The columns that are looked for where none is named, and what they hold."""


def nested_columns(options: PromptOptions) -> list[str]:
    """The dotted names that files are asked for: columns that are named, and such as go with a prompt and may lie beside it."""
    prompts = [name for name in _named(options).values() if name]
    beside = [_beside(name, prompt) for prompt in prompts for name in ("tools", TEMPLATE_OPTIONS, "attention_mask", *LOSS_MASKS)]
    return [
        name for name in (*prompts, options.id_column, options.tools_column, *(options.keep_columns or ()), *beside) if name and "." in name
    ]


def _beside(name: str, prompt: str) -> str:
    """A column's name in the object that holds the prompt's."""
    return ".".join([*prompt.split(".")[:-1], name])


def choose_columns(files: Sequence[tuple[PromptFile, FileColumns]], options: PromptOptions) -> Columns:
    """The one column of all files: the one that the options name, else the default one that is there.

    Raises:
        PromptsError: several are there or named, or an option of chats is given beside other prompts.
    """
    named = {kind: name for kind, name in _named(options).items() if name}
    if len(named) > 1:
        given = " and ".join(f"{kind}_column = {name!r}" for kind, name in named.items())
        raise PromptsError(f"{given} are both given, and a run's prompts come from one column.", "Name one.")
    found = {} if named else _found(files)
    if len(found) > 1:
        raise PromptsError(
            f"The prompts have several columns, and one of them must count for all rows: {' and '.join(found.values())}.", NAME_ONE
        )
    prompt = next(iter([*named.values(), *found]), "text")
    kind = next(iter(named), None) or _DEFAULTS[prompt]
    _refuse_options_of_chats(kind, options)
    is_messages, is_ids = kind == "messages", kind == "input_ids"

    def with_prompt(name: str) -> str:
        """Where what goes with the prompt is: beside it, or where no file shows that, among the columns."""
        shown = {place for _, present in files for place in (name, _beside(name, prompt)) if present and place in present}
        return name if shown == {name} else _beside(name, prompt)

    return Columns(
        prompt=prompt,
        kind=kind,
        row_id=options.id_column,
        tools=(options.tools_column or with_prompt("tools")) if is_messages else None,
        template_options=with_prompt(TEMPLATE_OPTIONS) if is_messages else None,
        attention_mask=with_prompt("attention_mask") if is_ids else None,
        loss_mask=_loss_mask(files, [with_prompt(name) for name in LOSS_MASKS]) if is_ids else None,
        rivals=frozenset() if named else frozenset(_DEFAULTS) - {prompt},
        kept=kept_columns([file for file, _ in files], options.keep_columns or ()),
    )


def _loss_mask(files: Iterable[tuple[PromptFile, FileColumns]], names: Sequence[str]) -> str:
    """Of the names the column with the loss masks of token ids, whether it is there or not."""
    there = [name for name in names if any(name in present for _, present in files if present is not None)]
    if len(there) > 1:
        raise PromptsError(f"The prompts have two columns of loss masks: {' and '.join(map(repr, there))}.", "Leave one of them out.")
    return [*there, *names][0]


def _named(options: PromptOptions) -> dict[Kind, str | None]:
    return {"text": options.text_column, "messages": options.messages_column, "input_ids": options.input_ids_column}


def _found(files: Iterable[tuple[PromptFile, FileColumns]]) -> dict[str, str]:
    """Each default column that is there, with words that say where it was found first."""
    seen: dict[str, str] = {}
    for file, present in files:
        if present is None:
            seen.setdefault("text", f"'text' (the lines of {file.name})")
        for name in _DEFAULTS:
            if present is not None and name in present:
                seen.setdefault(name, f"{name!r} (first in row {present[name]} of {file.name})")
    return {name: seen[name] for name in _DEFAULTS if name in seen}


def _refuse_options_of_chats(kind: Kind, options: PromptOptions) -> None:
    names = ("tools_column", "add_generation_prompt", "chat_template", "template_options", "mask")
    of_chats = {name: getattr(options, name) for name in names}
    if options.chat_template is not None:
        of_chats["chat_template"] = without_secrets(options.chat_template)
    given = ", ".join(f"{name} = {json.dumps(value)}" for name, value in of_chats.items() if value)
    if given and kind != "messages":
        raise PromptsError(
            f"{given} is given, but the prompts are no chat messages, and no template is applied to them.",
            "Leave it out, or set messages_column.",
        )


def absent_columns(files: Iterable[tuple[PromptFile, FileColumns]], columns: Columns, options: PromptOptions) -> list[PromptsError]:
    """What files lack of the columns that were chosen and named. Of files with the same columns that lack the same the first is named.

    A file that shows no columns has no rows, or rows that are quarantined one by one.
    """
    alike: dict[tuple[str, str, frozenset[str] | None], list[PromptFile]] = {}
    for file, present in files:
        for option, what in _lacking(present, columns, options):
            alike.setdefault((option, what, None if present is None else frozenset(present)), []).append(file)
    return [_absent(*lack, found) for lack, found in alike.items()]


def _lacking(present: FileColumns, columns: Columns, options: PromptOptions) -> Iterator[tuple[str, str]]:
    """The options that a file cannot do, and what it lacks."""
    needed = [("id_column", columns.row_id), ("tools_column", options.tools_column)]
    needed += [("keep_columns", name) for name in columns.kept.names]
    if present is None:
        needed.append((f"{columns.kind}_column", None if columns.kind == "text" else columns.prompt))
        yield from ((option, f"is plain text and has no column {name!r}") for option, name in needed if name is not None)
    elif present:
        absent = [(option, name) for option, name in needed if name is not None and name not in present]
        yield from ((option, f"has no column {name!r}") for option, name in absent)
        if columns.prompt not in present:
            # None was named, and every file that has another of the default columns was refused before.
            none = f"neither a column {' nor '.join(map(repr, _DEFAULTS))}" if columns.rivals else f"no column {columns.prompt!r}"
            yield "text_column, messages_column or input_ids_column", f"has {none}"


def _absent(option: str, what: str, present: frozenset[str] | None, files: Sequence[PromptFile]) -> PromptsError:
    more = f" So it is with {len(files) - 1:,} more files." if len(files) > 1 else ""
    if present is None:
        return PromptsError(f"{files[0].path} {what}.{more}", f"Leave {option} out, or the file.")
    listed = ", ".join(map(repr, sorted({*present, *_inside(files[0], present)})))
    return PromptsError(f"{files[0].path} {what}.{more}", f"Set {option} to one of its columns: {listed}.")


def _inside(file: PromptFile, present: Iterable[str]) -> list[str]:
    """The dotted names of what the first row's objects hold, as far as an error shows them; none of a file whose first row cannot be read."""
    with suppress(PromptsError):
        first = next(file.records(list(present)), Record({}))
        objects = {name: value for name, value in first.values.items() if isinstance(value, dict)}
        return [f"{name}.{key}" for name, value in objects.items() for key in value][:_SHOWN_NESTED]
    return []
