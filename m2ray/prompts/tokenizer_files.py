"""The files that a tokenizer is made of: found in the model's folder, hashed, and what is said where they make none."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash

from m2ray.errors import CheckpointError
from m2ray.hub import bringing
from m2ray.storage import local_folder, open_store

_VOCABULARY_FILES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_SENTENCEPIECE_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""A token in base 64 and its rank: some repositories call such a file tokenizer.model as well."""
_OTHER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
_FILES_BESIDE = ("chat_template.jinja", "chat_template.json", "config.json")
_TEMPLATES_FOLDER = "additional_chat_templates"
_MAX_FILE_BYTES = 128 << 20
"""Of one of the tokenizer's files; Gemma 3's tokenizer.json has 33 MB."""


@contextmanager
def tokenizer_folder(model_url: str) -> Iterator[Path]:
    """The model's folder, or for one in an object store a temporary one with the files that a tokenizer may be made of."""
    folder = local_folder(model_url)
    if folder is None:
        store = open_store(model_url)
        with TemporaryDirectory(prefix="m2ray-tokenizer-") as temporary:
            for name in (*_VOCABULARY_FILES, *_OTHER_FILES, *_FILES_BESIDE):
                if store.size(name) is not None:
                    Path(temporary, name).write_bytes(store.read(name))
            for key, _ in store.list(_TEMPLATES_FOLDER):
                Path(temporary, _TEMPLATES_FOLDER).mkdir(exist_ok=True)
                Path(temporary, _TEMPLATES_FOLDER, Path(key).name).write_bytes(store.read(key))
            yield Path(temporary)
        return
    if not folder.is_dir():
        raise CheckpointError(f"The model folder {model_url} is absent.", "Check the path.")
    yield folder


def not_loaded(folder: Path, model_url: str, error: Exception) -> CheckpointError:
    """What is said of a tokenizer that transformers does not load: which package it lacks, else its own words."""
    words = " ".join(str(error).split()).rstrip(".")
    what = f"transformers cannot load the tokenizer of {model_url}: {words}."
    if (folder / "tokenizer.json").is_file():
        return CheckpointError(what, "Copy the tokenizer's files again. Tokenizers that need code from the checkpoint are refused.")
    there = ", ".join(name for name in _VOCABULARY_FILES if (folder / name).is_file())
    if missing := _missing_readers(folder):
        what = f"{model_url} has {there} and no tokenizer.json, and {' and '.join(missing)}, which it takes to read that, is not installed."
        return CheckpointError(what, f"pip install {' '.join(missing)}; or put the same model's tokenizer.json there.")
    return CheckpointError(what, f"There is {there}, but no tokenizer.json: put the same model's there, or copy {there} again.")


def _missing_readers(folder: Path) -> list[str]:
    """The packages that read the folder's vocabulary and are not installed."""
    model = next((folder / name for name in _SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if model is None:
        return []
    with model.open("rb") as file:
        is_tiktoken = _TIKTOKEN_LINE.match(file.readline(1000)) is not None
    return [package for package in (["tiktoken"] if is_tiktoken else ["sentencepiece", "protobuf"]) if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return False


def digest_files(folder: Path, model_url: str) -> str:
    """xxh3-128 of the names and bytes of a tokenizer's files, 32 hex digits. Raises CheckpointError if there are none or one is damaged."""
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        what = f"{model_url} has no tokenizer: none of {', '.join(_VOCABULARY_FILES)}."
        raise CheckpointError(what, bringing(model_url, "Copy the tokenizer's files there."))
    digest = xxhash.xxh3_128()
    for name in sorted(_VOCABULARY_FILES + _OTHER_FILES):
        if not (folder / name).is_file():
            continue
        try:
            if (num_bytes := (folder / name).stat().st_size) > _MAX_FILE_BYTES:
                raise ValueError(f"{num_bytes:,} bytes, and m2ray reads up to {_MAX_FILE_BYTES:,}")
            data = (folder / name).read_bytes()
            if name.endswith(".json"):
                json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"The tokenizer's file {model_url}/{name} is damaged: {error}.", "Copy it again.") from error
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
