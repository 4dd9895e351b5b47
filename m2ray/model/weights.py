"""Load one span's tensors straight into the parameters: each byte is read once, converted in small pieces, written where it belongs.

Memory holds the parameters in their final dtype and a few pieces on their way, never a second copy of a layer.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.conversion import Placement
from m2ray.model.decoder import DecoderSpan
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.families import fp8_block
from m2ray.model.fp8 import Block, dequantize
from m2ray.model.gpu_loading import Lanes
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensors import FP8, SCALE, MatchedTensor, disk_bytes, match_by_layer

OnBytes = Callable[[int, int], None]

THREADS = 4
PIECE_BYTES = 8 * 2**20
"""Bytes of a piece on disk: a tensor that is longer is cut into pieces of as many whole rows as fit, at least one, those of an FP8 matrix
a multiple of the rows of its scales' block. In float32 an FP8 piece takes four times as much for a moment.

The layers' digests rest on it: with another number no run that began before can go on.
"""


class Loaded(NamedTuple):
    """What `load_weights` has loaded.

    Attributes:
        needed_bytes: checkpoint bytes of its tensors, scales included.
        digests: each layer's (m2ray.model.digests), and at None that of what runs before the first layer, if the span has it.
    """

    needed_bytes: int
    digests: Mapping[int | None, str]


def load_weights(checkpoint: Checkpoint, decoder: DecoderSpan, on_bytes: OnBytes, lanes: Lanes | None = None) -> Loaded:
    """Fill every parameter of the span from the checkpoint, and hash what is read.

    Args:
        on_bytes: called from this thread as tensors arrive, with the bytes read so far and those needed.
        lanes: readers that fill the span's GPU; None on a CPU.

    Raises:
        CheckpointError: the span's tensors are missing, unknown, misshapen, or overflow the compute dtype.
        StageError: a disk has no room for the layers that are kept there.
        StoreError: reading fails.
    """
    block, digests = fp8_block(checkpoint.whole_config), WeightDigests(checkpoint.headers, len(decoder.skeleton.layers) - 1)
    if lanes is not None:
        needed_bytes = _load_by_lanes(checkpoint, decoder, block, digests, on_bytes, lanes)
    else:
        matched = [each for layer in _match(checkpoint, decoder) for each in layer]
        digests.expect(matched)
        needed_bytes = sum(disk_bytes(each, checkpoint.headers) for each in matched)
        on_bytes(checkpoint.bytes_read, needed_bytes)
        pieces = _pieces(checkpoint, decoder, matched, block)
        _load_pieces(checkpoint, pieces, block, digests, lambda: on_bytes(checkpoint.bytes_read, needed_bytes))
    on_bytes(checkpoint.bytes_read, needed_bytes)
    decoder.check_complete()
    decoder.bring_layers()
    return Loaded(needed_bytes, digests.by_layer())


def _match(checkpoint: Checkpoint, decoder: DecoderSpan) -> Iterator[list[MatchedTensor]]:
    return match_by_layer(decoder.skeleton, checkpoint.headers, decoder.span, with_final_norm=decoder.with_final_norm)


def hash_weights(checkpoint: Checkpoint, layers_run: int, *, with_final_norm: bool = False) -> Mapping[int | None, str]:
    """The digests, as `load_weights` gives them, of what runs before the first layer, at None, and of the last of `layers_run` layers.

    They are read a piece at a time, and nothing is kept.

    Args:
        with_final_norm: whether the run has loaded it, which the model's last layer's digest says.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen.
        StoreError: reading fails.
    """
    skeleton = build_skeleton(checkpoint.whole_config, torch.bfloat16)
    block, digests = fp8_block(checkpoint.whole_config), WeightDigests(checkpoint.headers, layers_run - 1)
    span = LayerSpan(0, layers_run)
    matched = chain.from_iterable(match_by_layer(skeleton, checkpoint.headers, span, with_final_norm=with_final_norm))
    for each in [each for each in matched if each.tensor.layer in (None, layers_run - 1)]:
        digests.expect([each])
        values = torch.empty(each.tensor.shape, device="meta")
        for piece in chain.from_iterable(_cut(checkpoint, placement, placement.part_of(values), block) for placement in each.placements):
            for part in (piece.values, piece.scale):
                if part is not None:
                    _read(checkpoint, part, torch.empty(part.shape, dtype=part.dtype), digests)
    return digests.by_layer()


def _load_by_lanes(
    checkpoint: Checkpoint, decoder: DecoderSpan, block: Block, digests: WeightDigests, on_bytes: OnBytes, lanes: Lanes
) -> int:
    """Read a layer's tensors while those of the next are still being matched."""
    lanes.compile(block)
    needed_bytes = 0

    def fill(wanted: RowsToLoad, values: torch.Tensor, scale: torch.Tensor | None) -> None:
        _convert(wanted.key, values if scale is None else dequantize(values, scale, block), wanted.into)

    for matched in _match(checkpoint, decoder):
        needed_bytes += sum(disk_bytes(each, checkpoint.headers) for each in matched)
        digests.expect(matched)
        lanes.begin(checkpoint, list(_pieces(checkpoint, decoder, matched, block)), block, digests, fill)
    lanes.finish(lambda: on_bytes(checkpoint.bytes_read, needed_bytes))
    return needed_bytes


def _load_pieces(
    checkpoint: Checkpoint, pieces: Iterable[RowsToLoad], block: Block, digests: WeightDigests, on_piece: Callable[[], None]
) -> None:
    """Read and convert on the CPU, a few pieces at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for piece in pieces:
                if len(waiting) == 2 * THREADS:
                    waiting.popleft().result()
                    on_piece()
                waiting.append(pool.submit(_load, checkpoint, piece, block, digests))
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _piece(checkpoint: Checkpoint, key: str, rows: slice | None, into: torch.Tensor, block: Block) -> RowsToLoad:
    """Where some rows of a checkpoint tensor lie, all without `rows`, and where their scales do."""
    is_fp8 = checkpoint.headers[key].dtype in FP8
    scale = _range(checkpoint, key + SCALE, _scale_rows(rows, into, block)) if is_fp8 else None
    return RowsToLoad(key, _range(checkpoint, key, rows), scale, into)


def _range(checkpoint: Checkpoint, key: str, rows: slice | None) -> Range:
    """Where some rows of a checkpoint tensor lie."""
    header = checkpoint.headers[key]
    shape, offset = header.shape, header.offset
    if rows is not None:
        start, stop, _ = rows.indices(shape[0])
        offset += start * (header.num_bytes // shape[0])
        shape = (stop - start, *shape[1:])
    return Range(header.file, offset, prod(shape) * header.dtype.itemsize, header.dtype, tuple(shape))


def _pieces(checkpoint: Checkpoint, decoder: DecoderSpan, matched: Iterable[MatchedTensor], block: Block) -> Iterator[RowsToLoad]:
    """Allocate one model tensor after the other and cut what fills it into pieces."""
    for each in matched:
        values = decoder.allocate(each.tensor)
        for placement in each.placements:
            yield from _cut(checkpoint, placement, placement.part_of(values), block)
        assign(decoder.skeleton.model, each.tensor.name, values)


def assign(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Make `values` the parameter or persistent buffer of that dotted name."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:  # noqa: SLF001 - set_parameter has no public name
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    else:
        module.register_buffer(leaf, values)


def _cut(checkpoint: Checkpoint, placement: Placement, into: torch.Tensor, block: Block) -> Iterable[RowsToLoad]:
    """Pieces of at most PIECE_BYTES where rows allow it; FP8 rows are cut between blocks."""
    header = checkpoint.headers[placement.key]
    if placement.rows is None and (header.num_bytes <= PIECE_BYTES or into.dim() == 0):
        return [_piece(checkpoint, placement.key, None, into, block)]
    first, stop = placement.rows or (0, into.shape[0])
    step = max(1, PIECE_BYTES * header.shape[0] // max(header.num_bytes, 1))
    if header.dtype in FP8 and into.dim() == 2 and block is not None:
        step = max(block[0], step // block[0] * block[0])
    cuts = [(start, min(start + step, stop)) for start in range(first, stop, step)]
    return [_piece(checkpoint, placement.key, slice(*rows), into[rows[0] - first : rows[1] - first], block) for rows in cuts]


def _load(checkpoint: Checkpoint, wanted: RowsToLoad, block: Block, digests: WeightDigests) -> None:
    """Read one piece, hash it, convert it and write it into the model; what needs no conversion is read where it belongs."""
    into = wanted.into
    is_as_on_disk = wanted.values.dtype == into.dtype and into.is_contiguous()
    values = into if is_as_on_disk else torch.empty(wanted.values.shape, dtype=wanted.values.dtype)
    _read(checkpoint, wanted.values, values, digests)
    if wanted.scale is not None:
        scale = torch.empty(wanted.scale.shape, dtype=wanted.scale.dtype)
        _read(checkpoint, wanted.scale, scale, digests)
        values = dequantize(values, scale, block)
    _convert(wanted.key, values, into)


def _read(checkpoint: Checkpoint, piece: Range, out: torch.Tensor, digests: WeightDigests) -> None:
    if piece.num_bytes:
        data = out.view(-1).view(torch.uint8).numpy().data
        checkpoint.read_extent(piece.file, piece.offset, data)
        digests.add([piece], piece.offset, data)


def _convert(key: str, values: torch.Tensor, into: torch.Tensor) -> None:
    """Write values into the model in its dtype. Raises CheckpointError if float16 cannot hold them."""
    converted = values.to(into.dtype)
    if into.dtype == torch.float16 and not converted.isfinite().all():
        largest = float(values.abs().max())
        raise CheckpointError(f"{key} holds {largest:g}, which float16 cannot.", 'Set compute_dtype = "bfloat16" or "float32".')
    if converted is not into:
        into.copy_(converted)


def _scale_rows(rows: slice | None, into: torch.Tensor, block: Block) -> slice | None:
    """The rows of a piece's scales: of the same experts for three axes, of its row blocks for two."""
    if rows is None or block is None or into.dim() == 3:
        return None if block is None else rows
    return slice(rows.start // block[0], -(-rows.stop // block[0]))


def parameter_bytes(decoder: DecoderSpan) -> int:
    """Bytes of the span's tensors that the checkpoint gave, in memory; computed ones (rotary frequencies) do not count."""
    tensors = decoder.skeleton.model.state_dict().values()
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors if not tensor.is_meta)
