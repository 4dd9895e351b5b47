"""Tensors of the checkpoint cut into pieces, each of which is read, hashed and converted by itself."""

from collections.abc import Iterator

import torch

from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.float8.weights import of_scales
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.scratch import fresh_tensor, scratch_tensor
from m2ray.model.quantization.stored import Part, StoredTensor
from m2ray.model.tensors import MatchedTensor

PIECE_BYTES = 8 * 2**20
"""Bytes of a piece on disk: a tensor that is longer is cut into pieces of as many whole rows as fit, at least one, those of a quantised matrix
a multiple of what all its parts can be cut at, which is the rows of its scales' block. Unpacked, a piece takes twice to four times as much.

The layers' digests rest on it: with another number no run that began before can go on.
"""


def cut_all(matched: MatchedTensor, values: torch.Tensor) -> Iterator[RowsToLoad]:
    """What fills a model tensor: each tensor of the checkpoint of which it is made, in pieces. `values` is its memory."""
    for placement, stored in zip(matched.placements, matched.stored, strict=True):
        yield from cut(stored, placement.rows, placement.part_of(values))


def cut(stored: StoredTensor, rows: tuple[int, int] | None, into: torch.Tensor) -> Iterator[RowsToLoad]:
    """A tensor of the checkpoint, or some of its rows, in pieces of at most PIECE_BYTES where rows allow it.

    Quantised rows are cut where all their parts can be.

    Args:
        into: the part of a model tensor that they fill.
    """
    into = into if stored.swapped is None else into.transpose(*stored.swapped)
    values, step = stored.parts[0], stored.step_rows
    rows_of = tuple(part.rows for part in stored.parts) if step else ()
    if into.dim() == 0 or not step or (rows is None and values.header.num_bytes <= PIECE_BYTES):
        yield RowsToLoad(stored.key, {part.name: _whole(part.header) for part in stored.parts}, stored.unpack, into, rows_of)
        return
    first, stop = rows or (0, stored.num_rows)
    fitting = PIECE_BYTES * stored.num_rows // max(values.header.num_bytes, 1)
    step = max(1, fitting // step) * step
    for start in range(first, stop, step):
        end = min(start + step, stop)
        parts = {part.name: _range(part, start, end) for part in stored.parts}
        yield RowsToLoad(stored.key, parts, stored.unpack, into[start - first : end - first], rows_of)


def cut_values(matched: MatchedTensor, values: torch.Tensor) -> Iterator[RowsToLoad]:
    """The same of the values of a weight that stays FP8, as they lie."""
    for piece in cut_all(matched, values):
        yield RowsToLoad(piece.key, {"values": piece.values}, None, piece.into)


def cut_scales(matched: MatchedTensor, scales: torch.Tensor) -> Iterator[RowsToLoad]:
    """The same of its scales, cut where its values are."""
    values = torch.empty(matched.tensor.shape, dtype=matched.tensor.dtype, device="meta")
    for placement, stored in zip(matched.placements, matched.stored, strict=True):
        into, at = of_scales(placement).part_of(scales), 0
        for piece in cut(stored, placement.rows, placement.part_of(values)):
            part = piece.parts["scale"]
            stop = at + part.shape[0]
            yield RowsToLoad(stored.parts[1].key, {"values": part}, None, into[at:stop])
            at = stop


def _whole(header: TensorHeader) -> Range:
    return Range(header.file, header.offset, header.num_bytes, header.dtype, header.shape)


def _range(part: Part, first: int, stop: int) -> Range:
    """Where that lies of a part which some unpacked rows need."""
    header = part.header
    if not part.rows or not header.shape:
        return _whole(header)
    begin, num_bytes = part.bytes_of(first, stop)
    return Range(
        header.file, header.offset + begin, num_bytes, header.dtype, (-(-stop // part.rows) - first // part.rows, *header.shape[1:])
    )


def memory_of(name: str, part: Range) -> torch.Tensor:
    """For a part until it is unpacked: what this thread read the last one into, or, for a tensor that could not be cut, its own."""
    if part.num_bytes > PIECE_BYTES:
        return fresh_tensor(part.dtype, *part.shape)
    return scratch_tensor(f"read {name}", part.dtype, *part.shape)
