"""Paths that lead nowhere are told at once: whatever looks closer imports torch and transformers, which takes seconds."""

from glob import iglob
from pathlib import Path

from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, M2rayError, PromptsError, raise_all
from m2ray.hub import bringing, located
from m2ray.storage import local_folder, no_empty_folders, open_store

_GIVE = "Give the folder of a downloaded checkpoint: config.json and safetensors."
_CHECK = "Check the path; every node that runs m2ray's driver must see it."


def require_paths(config: ExtractConfig) -> None:
    """Look whether the paths of model, prompts and template lead somewhere, and whether the output can be written. What is in a bucket is looked
    at later (checking.py), as is what the files hold.

    Raises:
        M2rayError: a path leads nowhere, or to a folder that cannot be written; a name of a hub is not in this machine's cache. All problems at once.
    """
    problems: list[M2rayError] = []
    found = located(config)
    looks = [
        (_require_model, found.model),
        (_require_prompts, found.prompts),
        (_require_template, found.chat_template),
        (_require_output, found.output),
    ]
    for require, address in looks:
        try:
            folder = local_folder(address) if address else None
            if folder is not None and "\0" not in str(folder):
                require(str(address), folder)
        except M2rayError as problem:
            problems.append(problem)
    raise_all(problems)


def _require_model(given: str, folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(f"There is no folder {given}.", _GIVE)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(f"There is no config.json in {given}.", bringing(given, _GIVE))


def _require_prompts(given: str, path: Path) -> None:
    if set("*?[") & set(given):
        if next(iglob(str(path), recursive=True), None) is None:
            raise PromptsError(f"No file matches {given}.", "Check the pattern.")
    elif not path.exists():
        raise PromptsError(f"The prompts {given} are absent.", _CHECK)


def _require_template(given: str, path: Path) -> None:
    if not path.exists():
        raise PromptsError(f"Cannot read the chat template {given}: No such file or directory.", _CHECK)


def _require_output(given: str, _folder: Path) -> None:
    with no_empty_folders(given):
        open_store(given).probe()
