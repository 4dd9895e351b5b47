"""A checkpoint folder: config.json, the index, every file's header; tensors one by one, by exact byte range.

Layout: https://huggingface.co/docs/safetensors; `model.safetensors.index.json` maps each tensor to its file, a checkpoint of one
file has none.
"""

import json
import platform
import threading
from collections.abc import Mapping
from math import prod
from pathlib import PurePosixPath
from typing import Any

import torch
import xxhash

from m2ray.batches import TensorTable
from m2ray.errors import CheckpointError, M2rayError, StoreError, raise_all
from m2ray.model.families import parse_config
from m2ray.model.headers import COPY_AGAIN, FileHeader, TensorHeader, read_file_header
from m2ray.model.interpreter import without_collector
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensors import table_of, table_without_weights
from m2ray.model.towers import decoder_config
from m2ray.storage import Store, open_store

CONFIG, INDEX, SINGLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """What is known of a checkpoint without reading a tensor, and the way to read one.

    Attributes:
        whole_config: transformers' configuration (PreTrainedConfig) of all that the folder holds.
        config: its decoder's: the same, or a multimodal model's text tower's.
        headers: where each tensor lies, by the checkpoint's own key.
        digest: the model's fingerprint: xxh3-128 over config.json, the index, and every file's name, size and header, 32 hex digits.
        stale: entries of the index that their files do not hold. No damage by itself: the model may need none of them.
    """

    def __init__(
        self,
        store: Store,
        config: Any,
        headers: Mapping[str, TensorHeader],
        digest: str,
        problems: tuple[M2rayError, ...] = (),
        stale: tuple[CheckpointError, ...] = (),
    ) -> None:
        self.url = store.url
        self.whole_config = config
        self.config = decoder_config(config)
        self.headers = headers
        self.digest = digest
        self.stale = stale
        self._store = store
        self._problems = problems
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that `read` has fetched so far; headers and the index apart."""
        return self._bytes_read

    def check(self) -> None:
        """Raise one error that lists every absent, truncated or contradictory file.

        Raises:
            CheckpointError: the folder's files are incomplete or damaged.
            StoreError: they cannot be read.
        """
        raise_all(self._problems)

    def require(self, digest: str) -> None:
        """Raise CheckpointError if this is not the checkpoint of that fingerprint, on this node and by now."""
        if self.digest != digest:
            raise CheckpointError(
                f"{self.url} on node {platform.node()} is not the checkpoint that the run began with: config.json, the index, or a file's "
                f"name, size or header differs (fingerprint {self.digest}, the run's is {digest}).",
                "Put the files back with which the run began, on every node, or give another output.",
            )

    def read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or some rows of its first axis, in its dtype on disk, in host memory of its own.

        Safe to call from several threads.

        Raises:
            StoreError: the file ends before the tensor does, or cannot be read.
        """
        header = self.headers[key]
        shape, offset = header.shape, header.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * (header.num_bytes // shape[0])
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=header.dtype)
        num_bytes = prod(shape) * header.dtype.itemsize
        if num_bytes:
            self._store.read_into(header.file, offset, tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._count(num_bytes)
        return tensor

    def read_extent(self, file: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a run of tensors' bytes as they lie in `file`. Safe to call from several threads.

        Raises:
            StoreError: the file ends before that, or cannot be read.
        """
        self._store.read_into(file, offset, out)
        self._count(len(out))

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_read += num_bytes


@without_collector()
def open_checkpoint(url: str) -> Checkpoint:
    """Read config.json, the index and every file's header of the folder at `url`. `Checkpoint.check` tells their damage.

    Raises:
        CheckpointError: no folder, no config.json, no safetensors, or a model that m2ray does not run.
        StoreError: config.json or the index cannot be read.
    """
    store = open_store(url)
    if store.size(CONFIG) is None:
        raise CheckpointError(
            f"There is no {CONFIG} in {store.url}.", "Give the folder of a downloaded checkpoint: config.json and safetensors."
        )
    config_text = store.read(CONFIG)
    config = parse_config(config_text)
    fingerprint = xxhash.xxh3_128()
    _add(fingerprint, CONFIG, config_text)
    weight_map, index_text = _read_index(store)
    problems: list[M2rayError] = _unsafe_names(weight_map)
    if weight_map and not problems and store.size(SINGLE_FILE) is not None and SINGLE_FILE not in weight_map.values():
        shards = [file for file in sorted(set(weight_map.values())) if store.size(file) is not None]
        if not shards:  # save_pretrained leaves the index of the shards that its single file replaced
            weight_map, index_text = {}, b""
        problems += _two_sets_of_weights(shards)
    _add(fingerprint, INDEX, index_text)
    files: dict[str, FileHeader] = {}
    for file in sorted(set(weight_map.values()) or {SINGLE_FILE}) if not problems else ():
        try:
            files[file] = read_file_header(store, file)
        except (CheckpointError, StoreError) as problem:
            problems.append(problem)
            continue
        _add(fingerprint, f"{file} {files[file].size_bytes}", files[file].raw)
    headers, twice = _join(files)
    return Checkpoint(store, config, headers, fingerprint.hexdigest(), (*problems, *twice), _stale_entries(weight_map, files))


def _add(fingerprint: Any, name: str, content: bytes) -> None:
    fingerprint.update(f"{name}\0{len(content)}\0".encode())
    fingerprint.update(content)


def _read_index(store: Store) -> tuple[dict[str, str], bytes]:
    """The index's map from key to file and its text; both empty for a checkpoint of one file."""
    if store.size(INDEX) is None:
        if store.size(SINGLE_FILE) is None:
            raise CheckpointError(
                f"There is neither {INDEX} nor {SINGLE_FILE} in {store.url}.",
                "m2ray reads safetensors only: convert pickled weights first.",
            )
        return {}, b""
    text = store.read(INDEX)
    try:
        weight_map = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{INDEX} is not a JSON object with a weight_map: {error!r}.", COPY_AGAIN) from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"The weight_map of {INDEX} does not map tensors to files.", COPY_AGAIN)
    return weight_map, text


def _unsafe_names(weight_map: Mapping[str, str]) -> list[M2rayError]:
    """Files that an index must not name: outside the folder, or of a format that can run code."""
    return [
        CheckpointError(f"{INDEX} names {file!r}, which is no safetensors file inside the folder.", COPY_AGAIN)
        for file in sorted(set(weight_map.values()))
        if not file.endswith(".safetensors") or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts
    ]


def _two_sets_of_weights(shards: list[str]) -> list[CheckpointError]:
    """Which of two is meant nobody can tell, and to find them equal would take reading both."""
    if not shards:
        return []
    return [
        CheckpointError(
            f"There are both {SINGLE_FILE} and {INDEX} with {len(shards)} of its files ({shards[0]} ...): transformers reads the first, "
            "other programs the second.",
            "Remove those that do not belong to the model.",
        )
    ]


def _join(files: Mapping[str, FileHeader]) -> tuple[dict[str, TensorHeader], list[CheckpointError]]:
    """Every tensor of the files that could be read, and those that are in two of them."""
    headers: dict[str, TensorHeader] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for file, header in files.items():
        for key, tensor in header.tensors.items():
            if key in headers:
                twice.setdefault((headers[key].file, file), []).append(key)
            headers[key] = tensor
    problems = [
        CheckpointError(
            f"{first} and {second} both hold {_listed(keys)}: transformers takes the file that it reads last, whatever {INDEX} says.",
            "Remove the file that does not belong to the model, or copy both again.",
        )
        for (first, second), keys in twice.items()
    ]
    return headers, problems


def _stale_entries(weight_map: Mapping[str, str], files: Mapping[str, FileHeader]) -> tuple[CheckpointError, ...]:
    absent: dict[str, list[str]] = {}
    for key, file in weight_map.items():
        if file in files and key not in files[file].tensors:
            absent.setdefault(file, []).append(key)
    return tuple(
        CheckpointError(f"{INDEX} puts {len(keys)} tensors into {file} that it does not hold: {_listed(keys)}.", COPY_AGAIN)
        for file, keys in absent.items()
    )


def _listed(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


@without_collector()
def tensor_table(checkpoint: Checkpoint) -> TensorTable:
    """Every tensor of the model and of the checkpoint, matched.

    Raises:
        CheckpointError: files are damaged, or tensors missing, unknown, of a wrong shape or dtype; all at once.
        ConfigError, StoreError: as `build_skeleton` and `Checkpoint.check`.
    """
    checkpoint.check()
    skeleton = build_skeleton(checkpoint.whole_config, torch.bfloat16)
    try:
        return table_of(skeleton, checkpoint.headers)
    except CheckpointError as problem:
        raise_all([*checkpoint.stale, problem])
        raise


def tensor_table_from_config(config: Any) -> TensorTable:
    """The table by config.json alone, without a look at weights or index. See `table_without_weights`."""
    return table_without_weights(config)
