"""A checkpoint folder: config.json, the index, every file's header; tensors one by one, by exact byte range.

Layout: https://huggingface.co/docs/safetensors.
"""

import platform
import threading
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from math import prod
from typing import Any, Self

import torch
import xxhash

from m2ray.errors import CheckpointError, M2rayError, StoreError, raise_all
from m2ray.hub import bringing
from m2ray.model.families import parse_config, says_how_quantised
from m2ray.model.headers import COPY_AGAIN, FileHeader, TensorHeader, read_file_header
from m2ray.model.interpreter import without_collector
from m2ray.model.limits import MAX_CONFIG_BYTES, MAX_HEADERS_BYTES, read_limited
from m2ray.model.quantization.modelopt import HF_QUANT_CONFIG
from m2ray.model.towers import decoder_config
from m2ray.model.weight_files import INDEX, find_weights, indexed_bytes, no_weights
from m2ray.storage import Store, open_store

CONFIG = "config.json"

_NOT_TRANSFORMERS = "tok_embeddings.weight"
"""In the layout of Mistral's and Meta's own code, whose queries and keys lie in another order: `consolidated.safetensors`."""


class Checkpoint:
    """What is known of a checkpoint without reading a tensor, and the way to read one.

    Attributes:
        whole_config: transformers' configuration (PreTrainedConfig) of all that the folder holds.
        config: its decoder's: the same, or a multimodal model's text tower's.
        headers: where each tensor lies, by the checkpoint's own key.
        weight_map: the file of each tensor: as the files say, or the index of those that cannot be read.
        digests: of config.json, what says how weights are quantised, and the index, and of each file's name, size and header, by name; xxh3-128, 32 hex digits.
        damaged: what is wrong with files that are absent or cannot be read. No damage of the model by itself: it may need none of them.
        twice: tensors that are in two files.
        stale: entries of the index that their files do not hold, of which the same is true.
    """

    def __init__(
        self,
        store: Store,
        config: Any,
        texts: Mapping[str, bytes],
        weight_map: Mapping[str, str],
        files: Mapping[str, FileHeader],
        damaged: Mapping[str, M2rayError],
    ) -> None:
        self.url = store.url
        self.whole_config = config
        self.config = decoder_config(config)
        self.digests = {name: xxhash.xxh3_128_hexdigest(text) for name, text in texts.items()}
        self.digests |= {file: xxhash.xxh3_128_hexdigest(f"{header.size_bytes} ".encode() + header.raw) for file, header in files.items()}
        self.headers, self.twice = _join(files)
        self.weight_map = {**weight_map, **{key: header.file for key, header in self.headers.items()}}
        self.damaged = damaged
        self.stale = _stale_entries(weight_map, files)
        self._store = store
        self._texts = texts
        self._files = files
        self._bytes_read = 0
        self._lock = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """The fingerprint of all that `digests` names: xxh3-128, 32 hex digits."""
        return xxhash.xxh3_128_hexdigest("".join(f"{name}\0{digest}\0" for name, digest in sorted(self.digests.items())).encode())

    def only(self, files: Container[str]) -> Self:
        """The same without the weight files that are not among `files`, and without what is wrong with them."""
        if all(file in files for file in (*self._files, *self.damaged)):
            return self
        return type(self)(
            self._store,
            self.whole_config,
            self._texts,
            {key: file for key, file in self.weight_map.items() if file in files},
            {file: header for file, header in self._files.items() if file in files},
            {file: problem for file, problem in self.damaged.items() if file in files},
        )

    @property
    def weight_files(self) -> frozenset[str]:
        """The names of those that hold its tensors."""
        return frozenset(header.file for header in self.headers.values())

    @property
    def indexed_bytes(self) -> int | None:
        """The bytes of all tensors as the index sums them up; None without an index, or one that does not."""
        return indexed_bytes(self._texts[INDEX])

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that are fetched by now, by `read` or, as `count` was told, by another process; headers and the index apart."""
        return self._bytes_read

    def check(self) -> None:
        """Raise one error that lists every absent, truncated or contradictory file.

        Raises:
            CheckpointError: the folder's files are incomplete or damaged.
            StoreError: they cannot be read.
        """
        raise_all([*self.damaged.values(), *self.twice])

    def require(self, digests: Mapping[str, str]) -> None:
        """Raise CheckpointError if these files are not here as `digests` has them, on this node and by now."""
        if differing := sorted(name for name, digest in digests.items() if self.digests.get(name) != digest):
            raise CheckpointError(
                f"{self.url} on node {platform.node()} is not the checkpoint that the run began with: {_listed(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}, in a weight file its size or header.",
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
        self.count(num_bytes)
        return tensor

    def read_extent(self, file: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a run of tensors' bytes as they lie in `file`. Safe to call from several threads.

        Raises:
            StoreError: the file ends before that, or cannot be read.
        """
        self._store.read_into(file, offset, out)
        self.count(len(out))

    def versions(self, files: Iterable[str]) -> Mapping[str, str]:
        """What changes whenever one of these files is written anew, by name. Raises StoreError: a file is gone, or cannot be looked at."""
        return {file: self._store.version(file) for file in sorted(files)}

    def require_versions(self, versions: Mapping[str, str]) -> None:
        """Raise CheckpointError if these files have been written anew since `versions` gave that of each."""
        found = self.versions(versions)
        if differing := [file for file, version in versions.items() if found[file] != version]:
            raise CheckpointError(
                f"{_listed(differing)} of {self.url} changed while layers were read from there.",
                "Leave the model's files as they are while a run reads them. Committed shards are whole; put the files back and run it again.",
            )

    def count(self, num_bytes: int) -> None:
        """So many bytes of tensors have come. Any thread may call."""
        with self._lock:
            self._bytes_read += num_bytes


@without_collector()
def open_checkpoint(url: str) -> Checkpoint:
    """Read config.json, the index and every file's header of the folder at `url`. `Checkpoint.check` tells their damage.

    Raises:
        CheckpointError: no folder, no config.json, no safetensors or several sets of them, or a model that m2ray does not run.
        StoreError: config.json or the index cannot be read, or the bucket's folder not listed.
    """
    store = open_store(url)
    if store.size(CONFIG) is None:
        raise CheckpointError(
            f"There is no {CONFIG} in {store.url}.",
            bringing(store.url, "Give the folder of a downloaded checkpoint: config.json and safetensors."),
        )
    config, texts = read_config(store, CONFIG)
    found = find_weights(store, getattr(config, "transformers_weights", None))
    if found is None:
        raise no_weights(store)
    weight_map, index_text, names = found
    files: dict[str, FileHeader] = {}
    damaged: dict[str, M2rayError] = {}
    size_of = store.sizes(names)
    for name in names:
        try:
            files[name] = read_file_header(store, name, size_of)
        except (CheckpointError, StoreError) as problem:
            damaged[name] = problem
            continue
        if sum(len(header.raw) for header in files.values()) > MAX_HEADERS_BYTES:
            raise CheckpointError(f"The headers of its files have more than {MAX_HEADERS_BYTES:,} bytes together.", COPY_AGAIN)
    checkpoint = Checkpoint(store, config, {**texts, INDEX: index_text}, weight_map, files, damaged)
    if _NOT_TRANSFORMERS in checkpoint.headers:
        raise CheckpointError(
            f"{checkpoint.headers[_NOT_TRANSFORMERS].file} has tensors of other names ({_NOT_TRANSFORMERS} ...) and in another order of rows than "
            "transformers' model.",
            f"Take the files of the same release that {INDEX} names.",
        )
    return checkpoint


def read_config(store: Store, key: str) -> tuple[Any, dict[str, bytes]]:
    """The configuration of transformers of the whole model in a folder, and the texts of the files that say it, by name.

    Where config.json does not say how weights are quantised, ModelOpt's older exports say it in a file of its own.

    Raises:
        CheckpointError: as `parse_config`.
        StoreError: they cannot be read.
    """
    text = read_limited(store, key, MAX_CONFIG_BYTES)
    if says_how_quantised(text) or store.size(HF_QUANT_CONFIG) is None:
        return parse_config(text), {key: text}
    quantised = read_limited(store, HF_QUANT_CONFIG, MAX_CONFIG_BYTES)
    return parse_config(text, quantised), {key: text, HF_QUANT_CONFIG: quantised}


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
            "Remove the file that does not belong to the model.",
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
