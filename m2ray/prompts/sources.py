"""PromptSource: a file, folder, glob or saved Hugging Face dataset, read row by row in one fixed order."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Self

from m2ray.errors import PromptsError, raise_all
from m2ray.options import PromptOptions
from m2ray.prompts.arrow_files import ArrowStreamFile
from m2ray.prompts.columns import NAME_ONE, absent_columns, choose_columns
from m2ray.prompts.fingerprint import Fingerprint
from m2ray.prompts.formats import FORMATS, format_of
from m2ray.prompts.readers import PromptFile
from m2ray.prompts.remote import PromptPath, find
from m2ray.prompts.rows import Columns, FileColumns, PromptRow, as_row

_KNOWN_FORMATS = f"m2ray reads {', '.join(FORMATS)} and folders that Hugging Face datasets saved to disk."


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
        for file in _find_files(options.prompts):
            try:
                files.append((file, file.columns()))
            except PromptsError as problem:
                problems.append(problem)
        try:
            columns = choose_columns(files, options)
        except PromptsError as problem:
            raise_all([*problems, problem])
            raise
        raise_all(problems + [problem for file, present in files for problem in absent_columns(file, present, columns, options)])
        return cls(options, tuple(files), columns)

    @property
    def may_be_read_ahead(self) -> bool:
        """Whether rows may be read on one thread while another is at work: not where reading or rendering puts a limit on the whole process."""
        return not self.columns.is_messages and all(file.is_read_in_order for file, _ in self._files)

    @property
    def names(self) -> tuple[str, ...]:
        """The files' paths below the source's folder, in order."""
        return tuple(file.name for file, _ in self._files)

    def rows(self, fingerprint: Fingerprint | None = None) -> Iterator[PromptRow]:
        """Every row, bad ones with their reason. `fingerprint` takes the bytes as they are read.

        Raises:
            PromptsError: a file turns out to be damaged, a row has the column that the source was found not to have, or a file changes
                meanwhile where the fingerprint is taken.
        """
        sequence_id = 0
        for file, present in self._files:
            with fingerprint.reading(file) if fingerprint else nullcontext(file) as data:
                for number, record in enumerate(data.records(self.columns.of(present))):
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
        """xxh3-128 over each file's name, size and bytes, in order: 32 hex digits."""
        found = Fingerprint()
        for file, _ in self._files:
            found.add(file)
        return found.hexdigest()


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
