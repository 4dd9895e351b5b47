"""Files of torch.save: tensors and plain values, and nothing else that a pickle may hold. Pickles are read nowhere else in m2ray."""

import gzip
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from m2ray.prompts.memory import READ_BYTES, limited

MAX_PICKLE_BYTES = 16 << 20
"""Of a file's pickle, in which tensors are only named: their bytes lie beside it."""

MAX_UNPACKED_BYTES = 8 << 30
"""Of a gzip file, which is unpacked onto the disk."""

_PIECE_BYTES = 1 << 20


class UnreadableError(Exception):
    """Why a file of a dump is not read."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """What torch.save wrote to `path`, or gzip of it. Its tensors are the file's own pages, which are read when they are looked at.

    Raises:
        UnreadableError: it is not of torch's format of today (a zip file), it holds more than tensors and plain values, or it is too large.
    """
    with _plain_file(path) as file:
        _check_archive(file)
        yield _load(file)


def tensors_of(content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; one alone is called "states". Each has memory of its own for all its values.

    Raises:
        UnreadableError: there are none, or a tensor is not what the file holds.
    """
    named = {"states": content} if isinstance(content, torch.Tensor) else content
    if not isinstance(named, dict):
        raise UnreadableError(f"it holds a {type(content).__name__}, not a dict of tensors")
    tensors = {str(name): value.detach() for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UnreadableError(f"{name} is no plain tensor but {tensor.layout} on {tensor.device}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UnreadableError(f"{name} says that it has {tensor.numel():,} values, more than the file holds")
    if not tensors:
        raise UnreadableError("it holds no tensor")
    return tensors


@contextmanager
def _plain_file(path: Path) -> Iterator[Path]:
    if path.suffix != ".gz":
        yield path
        return
    with NamedTemporaryFile(prefix="m2ray-unpacked-") as unpacked:
        try:
            with gzip.open(path) as packed:
                while piece := packed.read(_PIECE_BYTES):
                    unpacked.write(piece)
                    if unpacked.tell() > MAX_UNPACKED_BYTES:
                        raise UnreadableError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UnreadableError(f"damaged gzip: {error}") from error
        unpacked.flush()
        yield Path(unpacked.name)


def _check_archive(file: Path) -> None:
    """That the file is a zip whose members lie in it as they are, with a pickle of a size to be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise UnreadableError(f"not what torch.save has written since torch 1.6: {error}") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnreadableError("its zip is compressed, which torch.save never does")
    num_bytes = max((member.file_size for member in members if member.filename.endswith(".pkl")), default=0)
    if num_bytes > MAX_PICKLE_BYTES:
        raise UnreadableError(f"its pickle has {num_bytes:,} bytes, and {MAX_PICKLE_BYTES:,} are read")


def _load(file: Path) -> Any:
    try:
        with limited(file.stat().st_size + READ_BYTES):  # the mapped file counts, and a few bytes of a pickle may ask for gigabytes
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnreadableError(f"it holds more than tensors and plain values ({_reason(error)})") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError) as error:
        raise UnreadableError(f"damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What torch says, without its advice: among others to read the pickle anyway."""
    lines = [line.strip() for line in str(error).split("WeightsUnpickler error:")[-1].splitlines()]
    told = [line for line in lines if line and not line.startswith(("Weights only load failed", "Check the documentation"))]
    return told[0].split(". ")[0][:200] if told else type(error).__name__
