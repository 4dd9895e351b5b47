"""Which bytes of a checkpoint's files are read at once: neighbours in a file joined to long reads, a quantised weight with its scales.

Published files differ: a weight's scales lie beside it, or all of a file's scales before all of its weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from m2ray.model.quantization.stored import Unpack

EXTENT_BYTES = 32 * 2**20 - 16
"""Of an extent, at most, where no piece is longer. With 16 bytes to align it a power of two: torch rounds pinned memory up to one.

Half as many bytes make twice as many calls for one interpreter: loading out of the page cache then took 1.4 times as long (16 cores)."""

_MAX_GAP_BYTES = 4096
"""Unwanted bytes between two wanted ones: to read this many costs less than another read."""

Item = TypeVar("Item")


class Range(NamedTuple):
    """Some rows of one checkpoint tensor as they lie in a file. A tuple, because thousands are made while lanes wait."""

    file: str
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.offset + self.num_bytes

    def of(self, data: torch.Tensor, offset: int) -> torch.Tensor:
        """These rows in `data`, uint8, that holds the file's bytes from `offset` on."""
        begin = self.offset - offset
        values = data[begin : begin + self.num_bytes]
        if begin % self.dtype.itemsize:
            values = values.clone()
        return values.view(self.dtype).view(self.shape)


class RowsToLoad(NamedTuple):
    """Some rows of the checkpoint's tensor `key`, and the part of a model tensor that they fill.

    Attributes:
        parts: where they lie, by part (m2ray.model.quantization.stored): the values first.
        unpack: makes them of the parts; None where they are as they lie.
        into: of the shape that they have then.
        rows_of: for each part, how many of these rows one of its own is about, 0 where all of it goes with every row; empty where `unpack` has
            to be given all rows at once.
    """

    key: str
    parts: Mapping[str, Range]
    unpack: Unpack | None
    into: torch.Tensor
    rows_of: tuple[int, ...] = ()

    @property
    def values(self) -> Range:
        return next(iter(self.parts.values()))

    @property
    def in_one_run(self) -> tuple[Range, ...]:
        """The values, and the parts that follow them without a gap, as they do."""
        values, *others = self.parts.values()
        run, stop = [values], values.stop
        for part in others:
            if part.offset == stop and part.file == values.file:
                run.append(part)
                stop = part.stop
        return tuple(run)

    @property
    def apart(self) -> tuple[Range, ...]:
        """The parts that are not in the run of the values."""
        run = self.in_one_run
        return tuple(part for part in self.parts.values() if part not in run) if len(run) < len(self.parts) else ()


@dataclass(slots=True)
class Extent(Generic[Item]):
    """A run of bytes of one file, and what lies in it."""

    file: str
    start: int
    stop: int
    items: list[Item]


def value_extents(wanted: Iterable[RowsToLoad]) -> list[Extent[RowsToLoad]]:
    """All wanted values, each with the parts that follow it."""
    return _joined((each.values.file, each.values.offset, each.in_one_run[-1].stop, each) for each in wanted)


def apart_extents(wanted: Iterable[RowsToLoad]) -> list[Extent[Range]]:
    """The parts that lie apart from their values, scales above all, each once."""
    apart = {part for each in wanted for part in each.apart}
    return _joined((part.file, part.offset, part.stop, part) for part in apart)


def _joined(runs: Iterable[tuple[str, int, int, Item]]) -> list[Extent[Item]]:
    """Neighbours in a file joined, up to EXTENT_BYTES; a run that is longer by itself stays one extent."""
    extents: list[Extent[Item]] = []
    for file, start, stop, item in sorted(runs, key=lambda run: run[:3]):
        last = extents[-1] if extents else None
        if last and last.file == file and 0 <= start - last.stop <= _MAX_GAP_BYTES and stop - last.start <= EXTENT_BYTES:
            last.stop = stop
            last.items.append(item)
        else:
            extents.append(Extent(file, start, stop, [item]))
    return extents
