"""Which of a folder's files hold the model's weights: as an index says, or a name, or because there is nothing else."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from m2ray.errors import CheckpointError, raise_all
from m2ray.hub import bringing
from m2ray.model.headers import COPY_AGAIN
from m2ray.model.limits import MAX_FILES, MAX_JSON_BYTES, parse_json, read_limited, short_repr
from m2ray.storage import Store

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

_INDEX = re.compile(r".+\.safetensors\.index(\..+)?\.json")  # model.safetensors.index.fp16.json is a variant's
_SHARD = re.compile(r"(?P<before>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*)\.safetensors")

_ADAPTER_CONFIG = "adapter_config.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")


def find_weights(store: Store, named: Any = None) -> tuple[Mapping[str, str], bytes, tuple[str, ...]] | None:
    """The weights of a folder; None where no file looks like weights that m2ray reads.

    transformers' two names come first, `model.safetensors` and its index. Without them whatever else is there is read, if it is one thing:
    an index of another name, one file, or shards numbered alike.

    Args:
        named: the file or index that config.json names (`transformers_weights`), which comes before all others; what else it may hold is refused.

    Returns:
        The index's map from tensor to file and its text, both empty without an index, and the files, some of which may be absent.

    Raises:
        CheckpointError: there are several sets of weights, or weights and an adapter, or an index that is malformed or names what is no
            safetensors file of the folder.
        StoreError: the index cannot be read.
    """
    found = _find(store, named)
    if found is not None and store.size(_ADAPTER_CONFIG) is not None:
        raise _adapter_beside(store)
    return found


def _find(store: Store, named: Any) -> tuple[Mapping[str, str], bytes, tuple[str, ...]] | None:
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"config.json: transformers_weights = {short_repr(named)} is no name of a file.", "Leave it out, or name one."
        )
    if named is not None:
        _require_safe("config.json: transformers_weights", [named.removesuffix(".index.json")])
    index = named if named and named.endswith(".json") else None
    files: Sequence[str] = [named] if named and not index else []
    if named is None:
        index = INDEX if store.size(INDEX) is not None else None
        has_single = store.size(SINGLE_FILE) is not None
        files = [SINGLE_FILE] if has_single else []
        if index is None and not has_single:
            index, files = _only_choice(store)
    weight_map, text = _read_index(store, index) if index else ({}, b"")
    of_index = sorted(set(weight_map.values()))
    if index == INDEX and files and SINGLE_FILE not in of_index:
        size_of = store.sizes(of_index)
        if shards := [file for file in of_index if size_of(file) is not None]:
            raise _two_sets(shards)
        return {}, b"", tuple(files)  # save_pretrained leaves the index of the shards that its single file replaced
    return (weight_map, text, tuple(of_index or files)) if of_index or files else None


def indexed_bytes(index: bytes) -> int | None:
    """The bytes of all tensors as an index sums them up; None without an index, or one that does not."""
    metadata = json.loads(index).get("metadata") if index else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) else None


def no_weights(store: Store) -> CheckpointError:
    """What to say of a folder without weights that m2ray reads: what is there, and what helps."""
    names = _names(store)
    adapters = [name for name in names if name.startswith("adapter_") and name.endswith((".safetensors", *_PICKLED))]
    pickled = [name for name in names if name.endswith(_PICKLED) and name not in adapters]
    others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
    found = ", ".join([*adapters, *pickled, *others][:8])
    what = f"{store.url} has neither {SINGLE_FILE} nor {INDEX}, nor any other safetensors file of a model" + (
        f"; there is {found}." if found else "."
    )
    if pickled:
        remedy = (
            "Pickled weights may run code when they are read, so m2ray reads safetensors only. Take the model's safetensors, or where you "
            "trust these files have transformers write some: from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)."
        )
    elif gguf := [name for name in others if name.endswith(".gguf")]:
        remedy = (
            "m2ray reads safetensors only: take those of the same model, or have transformers write some in BF16: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={gguf[0]!r}).save_pretrained(OTHER_FOLDER)."
        )
    elif others:
        remedy = "m2ray reads safetensors only: take those of the same model."
    elif adapters:
        remedy = "An adapter is not a model: merge it into the one that it was trained on (peft's merge_and_unload), and save that."
    else:
        remedy = bringing(store.url, "Download the model's safetensors into the folder.")
    return CheckpointError(what, remedy)


def _only_choice(store: Store) -> tuple[str | None, list[str]]:
    """The one index, or the files of the one set, that a folder holds; (None, []) where it holds none. Raises CheckpointError for several."""
    names = _names(store)
    indexes = [name for name in names if _INDEX.fullmatch(name)]
    named = {file for index in indexes for file in _read_index(store, index)[0].values()}
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if name.endswith(".safetensors") and not name.startswith("adapter_") and name not in named:
            shard = _SHARD.fullmatch(name)
            sets.setdefault(shard.group("before", "count", "after") if shard else (name,), []).append(name)
    if len(indexes) + len(sets) > 1:
        listed = ", ".join([*indexes, *(files[0] + (" ..." if len(files) > 1 else "") for files in sets.values())])
        raise CheckpointError(
            f"{store.url} has neither {SINGLE_FILE} nor {INDEX}, and several others: {listed}. Which is the model cannot be told.",
            "Keep one of them there.",
        )
    for key, files in sets.items():
        _require_whole(store, key, files)
    return (indexes[0] if indexes else None), [file for files in sets.values() for file in files]


def _require_whole(store: Store, key: tuple[str, ...], files: Sequence[str]) -> None:
    """Refuse numbered shards of which some are absent: without an index nobody knows what they hold."""
    count = int(key[1]) if len(key) > 1 else 1
    if len(files) != count:
        raise CheckpointError(
            f"{store.url} has no {INDEX}, and {len(files)} of {count} shards: {', '.join(files[:4])}{' ...' if len(files) > 4 else ''}.",
            bringing(store.url, "Copy the others there, or the index, by which m2ray sees which of them the layers need."),
        )


def _names(store: Store) -> list[str]:
    """The files of the folder itself."""
    return sorted(key for key, _ in store.list("", depth=1) if "/" not in key)


def _read_index(store: Store, index: str) -> tuple[dict[str, str], bytes]:
    """An index's map from tensor to file, and its text."""
    if store.size(index) is None:
        raise CheckpointError(
            f"There is no {index} in {store.url}, which config.json names.", bringing(store.url, "Copy the file into the folder.")
        )
    text = read_limited(store, index, MAX_JSON_BYTES)
    fields = parse_json(text, index)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if weight_map is None:
        raise CheckpointError(f"{index} is not a JSON object with a weight_map.", COPY_AGAIN)
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"The weight_map of {index} does not map tensors to files.", COPY_AGAIN)
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_FILES:
        raise CheckpointError(f"{index} names {len(files):,} files, and m2ray reads up to {MAX_FILES:,}.", COPY_AGAIN)
    _require_safe(index, files)
    return weight_map, text


def _require_safe(namer: str, files: Iterable[str]) -> None:
    """Refuse files outside the folder, or of a format that can run code."""
    raise_all(
        [
            CheckpointError(
                f"{namer} names {file!r}, which is no safetensors file inside the folder.",
                "m2ray reads no other: take the model's own index.",
            )
            for file in files
            if not file.endswith(".safetensors") or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\0" in file
        ]
    )


def _adapter_beside(store: Store) -> CheckpointError:
    """What transformers gives of such a folder depends on whether peft is installed."""
    return CheckpointError(
        f"There is {_ADAPTER_CONFIG} beside the model's own weights in {store.url}: transformers puts that adapter on the model where peft is "
        "installed, and leaves it out where it is not.",
        f"For rows of the model without it move {_ADAPTER_CONFIG} elsewhere; for rows with it merge it (peft's merge_and_unload), and save that.",
    )


def _two_sets(shards: Sequence[str]) -> CheckpointError:
    """Which of two is meant nobody can tell, and to find them equal would take reading both."""
    return CheckpointError(
        f"There are both {SINGLE_FILE} and {INDEX} with {len(shards)} of its files ({shards[0]} ...): transformers reads the first, "
        "other programs the second.",
        "Remove those that do not belong to the model.",
    )
