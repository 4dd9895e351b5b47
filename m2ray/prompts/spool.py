"""TokenSpool: the survey's token ids, and loss masks where they are asked for, on local disk, so that the extraction does not tokenise again."""

import os
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from m2ray.batches import Int32Array
from m2ray.errors import StoreError
from m2ray.storage import remedy_for

_ITEM_BYTES = 4
_BUFFER_BYTES = 1 << 20


class TokenSpool:
    """Token ids by sequence: one flat int32 file, and 16 bytes of memory a sequence to find them.

    The file lies in the temporary folder (TMPDIR) and has no name: it is gone when the spool is closed or the process dies.

    Args:
        keeps_masks: keep each sequence's loss mask too: in the sign of its token ids, which takes no bytes.
    """

    def __init__(self, *, keeps_masks: bool = False) -> None:
        self.keeps_masks = keeps_masks
        with naming_disk():
            # Outlives this function by design; `close` ends it. Unbuffered, so that closing it has nothing left to write.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._pending = bytearray()
        self._sequence_ids = array("q")
        self._bounds = array("q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._sequence_ids)

    @property
    def num_tokens(self) -> int:
        return self._bounds[-1]

    @property
    def first_id(self) -> int:
        """The first sequence's id. Raises IndexError without one."""
        return self._sequence_ids[0]

    def append(self, sequence_id: int, token_ids: Int32Array, loss_mask: bytes | None = None) -> None:
        """Add a sequence; ids must ascend. The mask is one byte 0 or 1 a token. Raises StoreError if the disk is full."""
        if self._sequence_ids and sequence_id <= self._sequence_ids[-1]:
            raise ValueError(f"sequence {sequence_id} comes after {self._sequence_ids[-1]}: ids must ascend")
        if self.keeps_masks:
            assert loss_mask is not None, f"sequence {sequence_id} has no loss mask"
            token_ids = np.where(np.frombuffer(loss_mask, np.bool_), token_ids, ~token_ids)
        self._pending += token_ids.astype("<i4", copy=False).tobytes()
        self._sequence_ids.append(sequence_id)
        self._bounds.append(self._bounds[-1] + len(token_ids))
        if len(self._pending) >= _BUFFER_BYTES:
            self._flush()

    def read(self, sequence_id: int) -> Int32Array:
        """The sequence's token ids, int32 [T]. Raises KeyError if it was never added."""
        words = self._read(sequence_id)
        return np.where(words < 0, ~words, words) if self.keeps_masks else words

    def mask(self, sequence_id: int) -> npt.NDArray[np.bool_]:
        """Its loss mask, bool [T], of a spool that keeps masks. Raises KeyError."""
        assert self.keeps_masks
        return self._read(sequence_id) >= 0

    def _read(self, sequence_id: int) -> Int32Array:
        place = bisect_left(self._sequence_ids, sequence_id)
        if place == len(self._sequence_ids) or self._sequence_ids[place] != sequence_id:
            raise KeyError(sequence_id)
        self._flush()
        start, stop = self._bounds[place], self._bounds[place + 1]
        with naming_disk():
            data = os.pread(self._file.fileno(), (stop - start) * _ITEM_BYTES, start * _ITEM_BYTES)
        words: Int32Array = np.frombuffer(data, dtype="<i4")
        return words

    def close(self) -> None:
        """Delete the file."""
        self._pending.clear()
        self._file.close()

    def _flush(self) -> None:
        with naming_disk():
            while self._pending:
                del self._pending[: os.write(self._file.fileno(), self._pending)]


@contextmanager
def naming_disk() -> Iterator[None]:
    """Around whatever writes to the temporary folder: a StoreError says that it is the disk there, and what it is needed for."""
    try:
        yield
    except OSError as error:
        folder = Path(tempfile.gettempdir())
        raise StoreError(
            f"Cannot keep token ids in the temporary folder {folder}: {error.strerror}.",
            f"{remedy_for(error, folder)} TMPDIR may name another folder, with 5 bytes for each token of the prompts.".lstrip(),
        ) from error
