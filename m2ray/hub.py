"""Names on the Hugging Face Hub, such as Qwen/Qwen3-0.6B: what this machine's cache holds of them. Nothing is downloaded.

A name is OWNER/NAME, with @REVISION where it is not main, and of a data set with a path inside of it: openai/gsm8k/main. What lies on the
disk under such a path comes first, as transformers has it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, M2rayError, PromptsError, raise_all
from m2ray.extras import naming_extras

Kind = Literal["model", "dataset"]

_WORD = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<id>(?:{_WORD}/)?{_WORD})(?:@(?P<revision>[^/@\s]+))?(?:/(?P<inside>[^@]+))?")
_CACHED = re.compile(r".*/(?:models|datasets)--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<inside>/.*)?")
_WORDS = {"model": "the model", "dataset": "the data set"}

_Config = TypeVar("_Config", bound=ExtractConfig)


def located(config: _Config) -> _Config:
    """The options with folders of the cache where model or prompts are named as the hub does. Raises as `folder_of`, both problems at once."""
    problems: list[M2rayError] = []
    found = {}
    kinds: dict[str, Kind] = {"model": "model", "prompts": "dataset"}
    for option, kind in kinds.items():
        given: str | None = getattr(config, option)  # of a plan, prompts may be left out
        try:
            found[option] = given and folder_of(given, kind)
        except M2rayError as problem:
            problems.append(problem)
    raise_all(problems)
    return config.model_copy(update=found)


def folder_of(name: str, kind: Kind = "model") -> str:
    """Where the cache has what the hub calls so, or what lies inside of it; any other name, path or URL as it is.

    Raises:
        CheckpointError, PromptsError: the cache has none of that name, or a part of a data set alone.
        MissingPackageError: huggingface_hub is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None or Path(name).exists():
        return name
    found = _snapshot(match, kind)
    if found is not None:
        return f"{found}/{match['inside']}" if match["inside"] else found
    if "/" not in match["id"] or (match["inside"] and not match["revision"]) or Path(name).parent.exists():
        return name  # a path, most likely: whoever opens it says that it is absent
    raise _error(kind)(
        f"{name} is no file or folder here, and the Hugging Face cache has nothing of {_WORDS[kind]} {match['id']}"
        f"{' at revision ' + match['revision'] if match['revision'] else ''}.",
        f"{_download(match, kind)} brings it there; m2ray downloads nothing. If it is a path, check it.",
    )


def is_name(text: str) -> bool:
    """Whether a text may be a name on the hub: OWNER/NAME, and nothing on the disk."""
    match = _NAME.fullmatch(text)
    return match is not None and "/" in match["id"] and not Path(text).exists()


def without_revision(name: str) -> str:
    """OWNER/NAME of OWNER/NAME@REVISION, as transformers takes it; any other text as it is."""
    match = _NAME.fullmatch(name)
    return str(match["id"]) if match and match["revision"] else name


def name_of(address: str) -> str:
    """What the hub calls a folder of the cache, with its commit, so that the same is found again: OWNER/NAME@COMMIT. Else the address as it is."""
    match = _CACHED.fullmatch(address)
    if match is None:
        return address
    name = f"{match['id'].replace('--', '/')}@{match['commit']}{match['inside'] or ''}".rstrip("/")
    kinds: tuple[Kind, ...] = ("model", "dataset")
    return name if any(_same(address, name, kind) for kind in kinds) else address


def bringing(address: str, otherwise: str) -> str:
    """What brings the file that a checkpoint's folder lacks: the hub's own command where the folder is of the cache, else `otherwise`."""
    name = name_of(address)
    match = None if name == address else _NAME.fullmatch(name)
    return otherwise if match is None else f"{_download(match, 'model')} brings it there."


def _same(address: str, name: str, kind: Kind) -> bool:
    try:
        return folder_of(name, kind) == address.rstrip("/")
    except M2rayError:
        return False


@naming_extras()
def _snapshot(match: re.Match[str], kind: Kind) -> str | None:
    """The cache's folder of a revision, or None. Of a model it may hold a part: what is missing is said by whoever opens it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    inside = match["inside"]
    wanted = [inside, f"{inside.rstrip('/')}/*"] if inside else None
    try:
        return snapshot_download(match["id"], repo_type=kind, revision=match["revision"], local_files_only=True, allow_patterns=wanted)
    except HFValidationError:
        return None
    except LocalEntryNotFoundError as error:
        held: str | None = getattr(error, "snapshot_path", None)
        if held is not None and kind == "dataset":
            raise PromptsError(
                f"The Hugging Face cache has a part of the data set {match['id']} alone.", f"{_download(match, kind)} brings the rest."
            ) from error
        return held


def _download(match: re.Match[str], kind: Kind) -> str:
    words = ["hf download", match["id"]]
    words += ["--repo-type dataset"] if kind == "dataset" else []
    words += [f"--revision {match['revision']}"] if match["revision"] else []
    return " ".join(words)


def _error(kind: Kind) -> Callable[[str, str], M2rayError]:
    return CheckpointError if kind == "model" else PromptsError
