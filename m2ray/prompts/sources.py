"""PromptSource: a file, folder, glob or saved Hugging Face dataset, read row by row in one fixed order."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import xxhash

from m2ray.errors import PromptsError, raise_all
from m2ray.prompts.readers import FORMATS, PLAIN_TEXT_COLUMN, ArrowStreamFile, PromptFile, format_of
from m2ray.prompts.remote import PromptPath, find, reading_store
from m2ray.prompts.rows import Columns, PromptRow, as_row

_HASHED_BYTES = 1 << 20
_KNOWN_FORMATS = f"m2ray reads {', '.join(FORMATS)} and folders that Hugging Face datasets saved to disk."


@dataclass(frozen=True)
class PromptOptions:
    """The options of an extraction that decide its sequences. `max_length` is in tokens."""

    prompts: str
    max_length: int
    text_column: str = "text"
    messages_column: str = "messages"
    id_column: str | None = None
    truncation: Literal["refuse", "cut"] = "refuse"


class PromptSource:
    """The rows of all files, numbered through: a row's `sequence_id` is its place, whether it is good or bad.

    Each file gives its prompts by one column: the text column if the file has one, else the messages column. Files of a
    folder or a glob come in the order of their paths; those of a saved dataset in the dataset's order.
    """

    def __init__(self, options: PromptOptions, files: tuple[tuple[PromptFile, Columns], ...]) -> None:
        self.options = options
        self._files = files

    @classmethod
    def open(cls, options: PromptOptions) -> Self:
        """Find the files and choose their columns; no prompt is read yet.

        Raises:
            PromptsError: the path is absent, no file matches, a file is of an unknown format, cannot be opened or has none
                of the columns. All of them at once.
        """
        files: list[tuple[PromptFile, Columns]] = []
        problems: list[PromptsError] = []
        for file in _find_files(options.prompts):
            try:
                files.append((file, _choose_columns(file, options)))
            except PromptsError as problem:
                problems.append(problem)
        raise_all(problems)
        return cls(options, tuple(files))

    @property
    def names(self) -> tuple[str, ...]:
        """The files' paths below the source's folder, in order."""
        return tuple(file.name for file, _ in self._files)

    @property
    def uses_messages(self) -> bool:
        """Whether any file holds chat messages, which need the model's chat template."""
        return any(columns.is_messages for _, columns in self._files)

    def rows(self) -> Iterator[PromptRow]:
        """Every row, bad ones with their reason. Raises PromptsError if a file turns out to be damaged."""
        sequence_id = 0
        for file, columns in self._files:
            wanted = [columns.prompt] if columns.row_id in (None, columns.prompt) else [columns.prompt, str(columns.row_id)]
            for record in file.records(wanted):
                yield as_row(record, sequence_id, columns)
                sequence_id += 1

    def fingerprint(self) -> str:
        """xxh3-128 over each file's name, size and bytes, in order: 32 hex digits."""
        digest = xxhash.xxh3_128()
        for file, _ in self._files:
            try:
                with reading_store(), file.path.open("rb") as data:
                    num_bytes = data.seek(0, os.SEEK_END)
                    data.seek(0)
                    digest.update(f"{file.name}\0{num_bytes}\0".encode("utf-8", "surrogateescape"))
                    while piece := data.read(_HASHED_BYTES):
                        digest.update(piece)
            except OSError as error:
                raise PromptsError(
                    f"Cannot read {file.path}: {error.strerror}.", "Check the file and the permission to read it."
                ) from error
        return digest.hexdigest()


def _find_files(prompts: str) -> list[PromptFile]:
    folder, found = find(prompts)
    names = {name for _, name in found} if folder else set()
    if folder and "state.json" in names:
        return _saved_dataset(folder)
    if folder and "dataset_dict.json" in names:
        splits = sorted(name.removesuffix("/state.json") for name in names if name.count("/") == 1 and name.endswith("/state.json"))
        raise _splits_error(folder, splits)
    return _as_prompt_files(found)


def _saved_dataset(folder: PromptPath) -> list[PromptFile]:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptsError(f"{folder / 'state.json'} does not list a saved dataset's files: {error}.", "Save the dataset again.") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise PromptsError(f"The dataset {folder} was saved with an index beside its rows.", "Save it again after flatten_indices().")
    absent = [
        PromptsError(f"The dataset {folder} lacks its file {name}.", "Copy it again.") for name in names if not (folder / name).is_file()
    ]
    raise_all(absent)
    if not names:
        raise PromptsError(f"The dataset {folder} has no files.", "Save one that has rows.")
    return [ArrowStreamFile(folder / name, name) for name in names]


def _splits_error(folder: PromptPath, splits: list[str]) -> PromptsError:
    return PromptsError(
        f"{folder} holds a dataset with the splits {', '.join(splits)}.", f"Name one of them: {folder / (splits or ['train'])[0]}"
    )


def _as_prompt_files(found: Sequence[tuple[PromptPath, str]]) -> list[PromptFile]:
    files: list[PromptFile] = []
    unknown: list[str] = []
    for path, name in found:
        file_format = format_of(path)
        if file_format is None:
            unknown.append(str(path))
        else:
            files.append(file_format(path, name))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise PromptsError(
            f"The format of {', '.join(unknown[:5])}{more} is unknown.",
            f"{_KNOWN_FORMATS} Rename the file, or leave others out with a glob such as 'folder/*.jsonl'.",
        )
    return files


def _choose_columns(file: PromptFile, options: PromptOptions) -> Columns:
    found = file.columns()
    if found is None:
        if options.id_column is not None:
            raise PromptsError(
                f"{file.path} is plain text and has no column {options.id_column!r}.", "Leave id_column out: positions name the rows."
            )
        return Columns(PLAIN_TEXT_COLUMN, is_messages=False, row_id=None)
    if not found:  # no row to tell from: there is none, or they are quarantined one by one
        return Columns(options.text_column, is_messages=False, row_id=options.id_column)
    listed = ", ".join(repr(name) for name in sorted(found))
    if options.id_column is not None and options.id_column not in found:
        raise PromptsError(f"{file.path} has no column {options.id_column!r}.", f"Set id_column to one of its columns: {listed}.")
    for column, is_messages in ((options.text_column, False), (options.messages_column, True)):
        if column in found:
            return Columns(column, is_messages=is_messages, row_id=options.id_column)
    raise PromptsError(
        f"{file.path} has neither a column {options.text_column!r} nor {options.messages_column!r}.",
        f"Set text_column or messages_column to one of its columns: {listed}.",
    )
