"""PromptSource: a file, folder, glob or saved Hugging Face dataset, read row by row in one fixed order."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from typing import Self

from m2ray.errors import PromptsError, raise_all
from m2ray.options import PromptOptions
from m2ray.prompts.arrow_files import ArrowFile
from m2ray.prompts.columns import NAME_ONE, absent_columns, choose_columns, nested_columns
from m2ray.prompts.fingerprint import Fingerprint
from m2ray.prompts.formats import READ, format_of
from m2ray.prompts.in_memory import name_in_memory
from m2ray.prompts.readers import PromptFile
from m2ray.prompts.remote import PromptPath, find
from m2ray.prompts.rows import Columns, FileColumns, PromptRow, as_row
from m2ray.prompts.splits import choose, of_split, without_others
from m2ray.prompts.text_encoding import UTF_8


class PromptSource:
    """The rows of all files, numbered through: a row's `sequence_id` is its place, whether it is good or bad.

    Files of a folder or a glob come in the order of their paths; those of a saved dataset in the dataset's order.
    """

    def __init__(self, options: PromptOptions, files: Sequence[tuple[PromptFile, FileColumns]], columns: Columns) -> None:
        self.options = options
        self.columns = columns
        self._files = files

    @classmethod
    def open(cls, options: PromptOptions) -> Self:
        """Find the files and choose the one column that holds their prompts; no prompt is read yet.

        Raises:
            PromptsError: the path is absent, no file matches, a file is of an unknown format, cannot be opened or lacks a
                column, or it is not clear which column counts. All of a folder's problems at once.
        """
        files: list[tuple[PromptFile, FileColumns]] = []
        problems: list[PromptsError] = []
        nested = nested_columns(options)
        found = _find_files(options)
        _refuse_encoding(found, options)
        for file in found:
            try:
                files.append((file, file.columns(nested)))
            except PromptsError as problem:
                problems.append(problem)
        try:
            columns = choose_columns(files, options)
        except PromptsError as problem:
            raise_all([*problems, problem])
            raise
        raise_all(problems + absent_columns(files, columns, options))
        return cls(options, tuple(files), columns)

    @property
    def may_be_read_ahead(self) -> bool:
        """Whether rows may be read while another thread is at work: not of formats whose reading puts a limit on the whole process."""
        return all(file.is_read_in_order for file, _ in self._files)

    @property
    def names(self) -> tuple[str, ...]:
        """The files' paths below the source's folder, in order."""
        return tuple(file.name for file, _ in self._files)

    def rows(self, fingerprint: Fingerprint | None = None) -> Iterator[PromptRow]:
        """Every row, bad ones with their reason; with `limit` the first ones alone. `fingerprint` takes the bytes as they are read.

        Raises:
            PromptsError: a file turns out to be damaged, a row has the column that the source was found not to have, or a file changes
                meanwhile where the fingerprint is taken.
        """
        sequence_id, limit = 0, self.options.limit
        for file, present in self._files:
            if sequence_id == limit:
                return
            with (
                fingerprint.reading(file) if fingerprint else nullcontext(file) as data,
                closing(data.records(self.columns.of(present))) as records,
            ):
                for number, record in enumerate(islice(records, None if limit is None else limit - sequence_id)):
                    if not self.columns.rivals.isdisjoint(record.values):
                        raise self._two_columns(file, number, min(self.columns.rivals & record.values.keys()))
                    yield as_row(record, sequence_id, self.columns)
                    sequence_id += 1

    def _two_columns(self, file: PromptFile, row: int, rival: str) -> PromptsError:
        return PromptsError(
            f"Row {row} of {file.path} has a column {rival!r}, but the rows before it have their prompts in {self.columns.prompt!r}.",
            NAME_ONE,
        )

    def fingerprint(self) -> str:
        """xxh3-128 over each file's name, size and bytes, in order: 32 hex digits. With `limit`, of the files that the first rows are in."""
        found = Fingerprint()
        if self.options.limit is not None:
            deque(self.rows(found), maxlen=0)
            return found.hexdigest()
        for file, _ in self._files:
            found.add(file)
        return found.hexdigest()


def _find_files(options: PromptOptions) -> list[PromptFile]:
    folder, found = find(options.prompts)
    names = {name for _, name in found}
    if folder is None or "state.json" in names:
        if options.split is not None:
            raise PromptsError(f"split = {options.split!r} is given, but {options.prompts} is no folder that has splits.", "Leave it out.")
        return _saved_dataset(folder) if folder else _as_prompt_files(found, options.encoding)
    if "dataset_dict.json" in names:
        saved = sorted(name.removesuffix("/state.json") for name in names if name.count("/") == 1 and name.endswith("/state.json"))
        return _saved_dataset(folder / (choose(folder, saved, options.split) or ""))
    return _as_prompt_files(of_split(folder, without_others(folder, found), options.split), options.encoding)


def _refuse_encoding(files: Sequence[PromptFile], options: PromptOptions) -> None:
    """Raise PromptsError where an encoding is named and a file has none to be told; that of prompts in memory is m2ray's own."""
    is_in_memory = name_in_memory(options.prompts) != options.prompts
    if options.encoding != UTF_8 and (others := [file for file in files if is_in_memory or not file.is_text]):
        raise PromptsError(
            f"encoding = {options.encoding!r} is given, but {others[0].path} is no text file.", "Leave it out, or give text files alone."
        )


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
    return [ArrowFile(folder / name, name) for name in names]


def _as_prompt_files(found: Sequence[tuple[PromptPath, str]], encoding: str) -> list[PromptFile]:
    files: list[PromptFile] = []
    unknown: list[str] = []
    for path, name in found:
        file_format = format_of(path)
        if file_format is None:
            unknown.append(str(path))
        else:
            files.append(file_format(path, name, encoding))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise PromptsError(
            f"The format of {', '.join(unknown[:5])}{more} is unknown.",
            f"{READ} Rename the file, or leave others out with a glob such as 'folder/*.jsonl'.",
        )
    return files
