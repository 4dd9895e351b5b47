"""Load one span's tensors straight into the parameters: each byte is read once, converted in small pieces, written where it belongs.

Memory holds the parameters in their final dtype and a few pieces on their way, never a second copy of a layer.
"""

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from m2ray.errors import CheckpointError
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.conversion import Placement
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import fp8_block
from m2ray.model.gpu_loading import Kept, Wanted, can_dequantize, dequantize_into, load_extents
from m2ray.model.tensors import FP8, SCALE, Match, disk_bytes, match_tensors

OnBytes = Callable[[int, int], None]

THREADS = 4
PIECE_BYTES = 8 * 2**20
"""Bytes of a piece on disk, at most; in float32 an FP8 piece takes four times as much for a moment."""

Block = tuple[int, int] | None
"""Rows and columns of an FP8 scale's block; None for one scale a tensor."""


@dataclass(frozen=True)
class _Piece:
    """Some rows of one checkpoint tensor, and the part of a model tensor that they fill."""

    key: str
    rows: slice | None
    into: torch.Tensor


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """Block-wise FP8 as bfloat16: `(weight.float() * scale).to(bfloat16)`, each scale over its block of the last two axes.

    Args:
        weight: FP8 [..., rows, columns].
        scale: [..., row blocks, column blocks], the last ones possibly cut short; one number if `block` is None.
        block: rows and columns of a block.
    """
    values = weight.float()
    if block is None:
        return values.mul_(scale.float().reshape(())).to(torch.bfloat16)
    scale_by_column = scale.float().repeat_interleave(block[1], dim=-1)[..., : weight.shape[-1]]
    for rows, row_scale in zip(values.split(block[0], dim=-2), scale_by_column.unbind(-2), strict=True):
        rows.mul_(row_scale.unsqueeze(-2))
    return values.to(torch.bfloat16)


def load_weights(checkpoint: Checkpoint, decoder: DecoderSpan, on_bytes: OnBytes) -> int:
    """Fill every parameter of the span from the checkpoint.

    Args:
        on_bytes: called from this thread as tensors arrive, with the bytes read so far and those needed.

    Returns:
        The checkpoint bytes that the span needs, scales included.

    Raises:
        CheckpointError: the span's tensors are missing, unknown, misshapen, or overflow the compute dtype.
        StageError: a disk has no room for the layers that are kept there.
        StoreError: reading fails.
    """
    with _no_collecting():
        match = match_tensors(decoder.skeleton, checkpoint.headers, decoder.span)
        needed_bytes = sum(disk_bytes(filling, checkpoint.headers) for filling in match.fillings)
        on_bytes(checkpoint.bytes_read, needed_bytes)
        block = fp8_block(checkpoint.config)
        pieces = _pieces(checkpoint, decoder, match, block)
        if decoder.device.type == "cuda":
            wanted = [each for piece in pieces for each in _wanted(checkpoint, piece, block)]
            load_extents(checkpoint, wanted, decoder.device, lambda: on_bytes(checkpoint.bytes_read, needed_bytes))
        else:
            _load_pieces(checkpoint, pieces, block, lambda: on_bytes(checkpoint.bytes_read, needed_bytes))
        on_bytes(checkpoint.bytes_read, needed_bytes)
    decoder.check_complete()
    decoder.take_turns()
    return needed_bytes


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Python's collector, called by thousands of small objects, looks through all of torch's and transformers' each time, for 0.1 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_pieces(checkpoint: Checkpoint, pieces: Iterable[_Piece], block: Block, on_piece: Callable[[], None]) -> None:
    """Read and convert on the CPU, a few pieces at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for piece in pieces:
                if len(waiting) == 2 * THREADS:
                    waiting.popleft().result()
                    on_piece()
                waiting.append(pool.submit(_load, checkpoint, piece, block))
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _wanted(checkpoint: Checkpoint, piece: _Piece, block: Block) -> Iterator[Wanted]:
    """A piece's bytes, and those of its scale; whichever of the two comes last converts both."""
    header = checkpoint.headers[piece.key]
    if header.dtype not in FP8:
        yield _range(checkpoint, piece.key, piece.rows, lambda values: _convert(piece.key, values, piece.into))
        return
    first: dict[str, Kept] = {}
    lock = threading.Lock()

    def arrive(name: str, values: torch.Tensor) -> None:
        with lock:
            if not first:
                first[name] = Kept(values)
                return
        ((other_name, other),) = first.items()
        both = {name: values, other_name: other.tensor_here()}
        weight, scale = both["weight"], both["scale"]
        if can_dequantize(weight, block, piece.into):
            dequantize_into(weight, scale.float(), block or (1, 1), piece.into)
        else:
            _convert(piece.key, dequantize(weight, scale, block), piece.into)

    yield _range(checkpoint, piece.key, piece.rows, lambda values: arrive("weight", values))
    yield _range(checkpoint, piece.key + SCALE, _scale_rows(piece, block), lambda values: arrive("scale", values))


def _range(checkpoint: Checkpoint, key: str, rows: slice | None, arrive: Callable[[torch.Tensor], None]) -> Wanted:
    """Where some rows of a checkpoint tensor lie."""
    header = checkpoint.headers[key]
    shape, offset = header.shape, header.offset
    if rows is not None:
        start, stop, _ = rows.indices(shape[0])
        offset += start * (header.num_bytes // shape[0])
        shape = (stop - start, *shape[1:])
    return Wanted(header.file, offset, prod(shape) * header.dtype.itemsize, header.dtype, tuple(shape), arrive)


def _pieces(checkpoint: Checkpoint, decoder: DecoderSpan, match: Match, block: Block) -> Iterator[_Piece]:
    """Allocate one model tensor after the other and cut what fills it into pieces."""
    for filling in match.fillings:
        values = decoder.allocate(filling.tensor)
        for placement in filling.placements:
            yield from _cut(checkpoint, placement, placement.part_of(values), block)
        assign(decoder.skeleton.model, filling.tensor.name, values)


def assign(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Make `values` the parameter or persistent buffer of that dotted name."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:  # noqa: SLF001 - set_parameter has no public name
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    else:
        module.register_buffer(leaf, values)


def _cut(checkpoint: Checkpoint, placement: Placement, into: torch.Tensor, block: Block) -> Iterable[_Piece]:
    """Pieces of at most PIECE_BYTES where rows allow it; FP8 rows are cut between blocks."""
    header = checkpoint.headers[placement.key]
    if header.num_bytes <= PIECE_BYTES or into.dim() == 0:
        return [_Piece(placement.key, None, into)]
    num_rows = into.shape[0]
    step = max(1, PIECE_BYTES * num_rows // header.num_bytes)
    if header.dtype in FP8 and into.dim() == 2 and block is not None:
        step = max(block[0], step // block[0] * block[0])
    return [_Piece(placement.key, slice(start, start + step), into[start : start + step]) for start in range(0, num_rows, step)]


def _load(checkpoint: Checkpoint, piece: _Piece, block: Block) -> None:
    """Read one piece, bring it to the device, convert it there and write it into the model."""
    device = piece.into.device
    values = checkpoint.read(piece.key, piece.rows).to(device)
    if values.dtype in FP8:
        scale = checkpoint.read(piece.key + SCALE, _scale_rows(piece, block)).to(device)
        values = dequantize(values, scale, block)
    _convert(piece.key, values, piece.into)


def _convert(key: str, values: torch.Tensor, into: torch.Tensor) -> None:
    """Write values into the model in its dtype. Raises CheckpointError if float16 cannot hold them."""
    converted = values.to(into.dtype)
    if into.dtype == torch.float16 and not converted.isfinite().all():
        largest = float(values.abs().max())
        raise CheckpointError(f"{key} holds {largest:g}, which float16 cannot.", 'Set compute_dtype = "bfloat16" or "float32".')
    into.copy_(converted)


def _scale_rows(piece: _Piece, block: Block) -> slice | None:
    """The rows of a piece's scales: of the same experts for three axes, of its row blocks for two."""
    if piece.rows is None or block is None or piece.into.dim() == 3:
        return None if block is None else piece.rows
    return slice(piece.rows.start // block[0], -(-piece.rows.stop // block[0]))


def parameter_bytes(decoder: DecoderSpan) -> int:
    """Bytes of the span's tensors that the checkpoint gave, in memory; computed ones (rotary frequencies) do not count."""
    tensors = decoder.skeleton.model.state_dict().values()
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors if not tensor.is_meta)
