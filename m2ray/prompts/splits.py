"""A folder as a hub of datasets leaves it: files that hold no rows are passed over, and its splits have names."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from m2ray.errors import PromptsError, did_you_mean
from m2ray.prompts.remote import PromptPath

_NO_ROWS = re.compile(r"(readme|licen[cs]e|notice)(\.(md|markdown|rst|txt|html|pdf))?|dataset_infos?\.json", re.IGNORECASE)
"""Words for people. A file of that name in a format of rows holds rows."""

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_NUMBERED = re.compile(r"(?P<split>.+)[-_.]\d{5}-of-\d{5}.*")


def without_others(folder: PromptPath, found: Sequence[tuple[PromptPath, str]]) -> list[tuple[PromptPath, str]]:
    """The files of a folder without those that describe a dataset. Raises PromptsError if none is left."""
    left = [(path, name) for path, name in found if not _NO_ROWS.fullmatch(PurePosixPath(name).name)]
    if not left:
        raise PromptsError(f"The folder {folder} holds no files with rows.", "Give one with prompts.")
    return left


def of_split(folder: PromptPath, found: Sequence[tuple[PromptPath, str]], split: str | None) -> list[tuple[PromptPath, str]]:
    """The files of one split of a folder. Raises PromptsError where there are several and none is named, or not the named one."""
    by_file = {name: split_of(name) for _, name in found}
    choose(folder, sorted({name for name in by_file.values() if name is not None}), split)
    return [(path, name) for path, name in found if split is None or by_file[name] == split]


def choose(folder: PromptPath, splits: Sequence[str], split: str | None) -> str | None:
    """The named split, else the only one, else none where the folder has none. Raises PromptsError."""
    listed = ", ".join(splits)
    if split is None:
        if len(splits) > 1:
            raise PromptsError(
                f"{folder} holds several splits: {listed}.", f'Name one: split = "{splits[0]}". Of files that a glob names all are read.'
            )
        return splits[0] if splits else None
    if split not in splits:
        raise PromptsError(
            f"{folder} has no split {split!r}.",
            f"{did_you_mean(split, splits)}Set split to one of: {listed}." if splits else "Its files name no splits: leave split out.",
        )
    return split


def split_of(name: str) -> str | None:
    """The split that a file below a folder belongs to, with the folders on the way but for a first "data"; None if its name says none.

    It is the folder that is called train, test or the like; what stands before "-00000-of-00002"; or such a word in the file's name.
    """
    *folders, file = name.split("/")
    if folders[:1] == ["data"]:
        folders = folders[1:]
    for depth, folder in enumerate(folders, 1):
        if folder.lower() in _SPLITS:
            return "/".join(folders[:depth])
    numbered = _NUMBERED.fullmatch(file)
    words = re.split(r"[^a-z0-9]+", file.lower())
    own = numbered["split"] if numbered else next((word for word in words if word in _SPLITS), None)
    return None if own is None else "/".join([*folders, own])
