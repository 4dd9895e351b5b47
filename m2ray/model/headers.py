"""What a safetensors file says about itself before any tensor is read: https://huggingface.co/docs/safetensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from m2ray.errors import CheckpointError
from m2ray.hub import bringing
from m2ray.model.limits import MAX_AXES, MAX_JSON_BYTES, MAX_NUMBER, MAX_TENSORS, parse_json, short_repr
from m2ray.storage import Store

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
COPY_AGAIN = "Copy the file again."

_POINTER = b"version https://git-lfs"


class TensorHeader(NamedTuple):
    """Where one tensor lies: `num_bytes` bytes of `file` from the absolute `offset` on, little-endian, row-major.

    A tuple, for MiniMax-M2 has 96,103 of them, and a stage opens them all before it reads.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class FileHeader:
    """One safetensors file: its size, the header's own bytes and the tensors they describe."""

    size_bytes: int
    raw: bytes
    tensors: Mapping[str, TensorHeader]


def read_file_header(store: Store, file: str, size_of: Callable[[str], int | None] | None = None) -> FileHeader:
    """Read and validate the header of one safetensors file; the tensors' own bytes stay unread.

    Args:
        size_of: as the store's `sizes` gave it for several files; the store is asked by default.

    Raises:
        CheckpointError: the file is absent, truncated or contradicts itself.
        StoreError: the store cannot read it.
    """
    size_bytes = (size_of or store.size)(file)
    if size_bytes is None:
        raise CheckpointError(f"{store.url} has no file {file}.", bringing(store.url, "Copy the missing file into the folder."))
    raw = _read_raw(store, file, size_bytes)
    entries: Any = parse_json(raw, f"The header of {file}")
    if not isinstance(entries, dict):
        raise CheckpointError(f"The header of {file} is not a JSON object.", COPY_AGAIN)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"The header of {file} names {len(entries):,} tensors, and m2ray reads up to {MAX_TENSORS:,}.", COPY_AGAIN)
    data_start = 8 + len(raw)
    tensors = {key: _parse_entry(file, key, entry, data_start) for key, entry in entries.items()}
    _check_layout(file, tensors, data_start, size_bytes)
    return FileHeader(size_bytes, raw, tensors)


def _read_raw(store: Store, file: str, size_bytes: int) -> bytes:
    if size_bytes < 8:
        raise CheckpointError(f"{file} has {size_bytes} bytes only: it is truncated.", COPY_AGAIN)
    first = store.read_range(file, 0, 8)
    if first == _POINTER[:8] and store.read_range(file, 0, min(size_bytes, len(_POINTER))) == _POINTER:
        raise CheckpointError(
            f"{file} holds no tensors, but the {size_bytes} bytes by which Git LFS says where they are.",
            "Fetch the file itself: `git lfs pull` in the clone that it comes from.",
        )
    header_bytes = int.from_bytes(first, "little")
    if header_bytes > MAX_JSON_BYTES:
        what = f"{file} is no safetensors file: it claims a header of {header_bytes} bytes, and m2ray reads up to {MAX_JSON_BYTES}."
        raise CheckpointError(what, COPY_AGAIN)
    if 8 + header_bytes > size_bytes:
        raise CheckpointError(f"{file} has {size_bytes} bytes, its header alone needs {8 + header_bytes}: it is truncated.", COPY_AGAIN)
    return bytes(store.read_range(file, 8, header_bytes))


def _parse_entry(file: str, key: str, entry: Any, data_start: int) -> TensorHeader:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry for {key!r} is malformed: {short_repr(entry)}.", COPY_AGAIN) from error
    if len(shape) > MAX_AXES or any(type(number) is not int or not 0 <= number <= MAX_NUMBER for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: the header's entry for {key!r} has a size that is no count: {short_repr(entry)}.", COPY_AGAIN)
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{file}: {key!r} is of dtype {short_repr(dtype_name)}.", f"m2ray reads {', '.join(DTYPES)}.")
    dtype = DTYPES[dtype_name]
    num_bytes = prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{file}: {key!r} is {dtype_name} {list(shape)}, {num_bytes} bytes, but has {end - begin} bytes in the file.",
            COPY_AGAIN,
        )
    return TensorHeader(file, dtype, shape, data_start + begin, num_bytes)


def _check_layout(file: str, tensors: Mapping[str, TensorHeader], data_start: int, size_bytes: int) -> None:
    """Tensors follow each other without gap or overlap and end where the file ends."""
    end = data_start
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{file}: {key!r} starts at byte {tensor.offset}, the tensor before it ends at {end}.", COPY_AGAIN)
        end += tensor.num_bytes
    if end != size_bytes:
        damage = "it is truncated" if size_bytes < end else "something was appended to it"
        raise CheckpointError(f"{file} has {size_bytes} bytes, its header describes {end}: {damage}.", COPY_AGAIN)
