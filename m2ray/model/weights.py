"""Load one span's tensors straight into the parameters: each byte is read once, converted in small pieces, written where it belongs.

Memory holds the parameters in their final dtype and a few pieces on their way, never a second copy of a layer. Layers that stay packed
(m2ray.model.residency) are read as they lie.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from m2ray.batches import LayerSpan
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.filling import assign, fill
from m2ray.model.float8.modules import use_float8
from m2ray.model.float8.weights import in_parts, is_packed, require_any, require_float8
from m2ray.model.gpu_loading import Lanes
from m2ray.model.openmp import lone_threads
from m2ray.model.pieces import cut_all, cut_scales, cut_values, memory_of
from m2ray.model.quantization.layouts import layout_of
from m2ray.model.quantization.scratch import fresh_tensor
from m2ray.model.residency.packed_layers import PackedLayers
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensors import MatchedTensor, disk_bytes, match_by_layer

if TYPE_CHECKING:
    from concurrent.futures import Future

OnBytes = Callable[[int, int], None]

THREADS = 4


class _Loading:
    """One call of `load_weights`: packed layers go to their places, the others onto the device as they are computed with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: DecoderSpan,
        digests: WeightDigests,
        packed: PackedLayers,
        on_bytes: OnBytes,
        *,
        in_float8: bool,
    ) -> None:
        self._checkpoint, self._decoder, self._digests, self._packed = checkpoint, decoder, digests, packed
        self._on_bytes = on_bytes
        self._in_float8 = in_float8
        self.needed_bytes = 0

    def on_cpu(self) -> None:
        ready = [each for layer in self._ready() for each in layer]
        self._read_on()
        _by_threads(partial(_load, self._checkpoint, self._digests), _pieces(self._decoder, ready), self._read_on)
        self._packed.finish(self._read_on)

    def by_lanes(self, lanes: Lanes) -> None:
        """Read a layer's tensors while those of the next are still being matched."""
        if layout_of(self._checkpoint.whole_config).methods:
            lanes.compile()
        for layer in self._ready():
            lanes.begin(self._checkpoint, list(_pieces(self._decoder, layer)), self._digests, fill)
        self._packed.finish(self._read_on)
        lanes.finish(self._read_on)

    def _ready(self) -> "Iterator[list[_Filling]]":
        """The tensors of each layer that is not packed, and those of none; packed ones are begun."""
        for matched in _match(self._checkpoint, self._decoder):
            self.needed_bytes += sum(disk_bytes(each) for each in matched)
            self._digests.expect(matched)
            number = matched[0].tensor.layer if matched else None
            if self._in_float8 and number is not None:
                require_float8(self._decoder.skeleton.model, matched)
            fillings = [filling for each in matched for filling in _fillings(each, in_float8=self._in_float8)]
            if number is not None and number in self._packed:
                self._packed.begin(number, [(each.tensor, _unplaced(each)) for each in fillings], self._checkpoint, self._digests)
            else:
                yield fillings

    def _read_on(self) -> None:
        self._on_bytes(self._checkpoint.bytes_read, self.needed_bytes)


class Loaded(NamedTuple):
    """What `load_weights` has loaded.

    Attributes:
        needed_bytes: checkpoint bytes of its tensors, scales and other parts included.
        digests: each layer's (m2ray.model.digests), and at None that of what runs before the first layer, if the span has it.
        bare_last_layer: that of the model's last layer without the final norm, if that was loaded.
    """

    needed_bytes: int
    digests: Mapping[int | None, str]
    bare_last_layer: str | None


class _Filling(NamedTuple):
    """A tensor that is loaded, and how what fills it is cut into pieces, of the memory that it gets."""

    tensor: MatchedTensor
    cut: Callable[[torch.Tensor], Iterator[RowsToLoad]]

    def empty(self, device: torch.device | str) -> torch.Tensor:
        shape, dtype = self.tensor.tensor.shape, self.tensor.tensor.dtype
        on_cpu = torch.device(device).type == "cpu"
        return fresh_tensor(dtype, *shape) if on_cpu else torch.empty(shape, dtype=dtype, device=device)


def load_weights(
    checkpoint: Checkpoint, decoder: DecoderSpan, on_bytes: OnBytes, lanes: Lanes | None = None, *, in_float8: bool = False
) -> Loaded:
    """Fill every parameter of the span from the checkpoint, and hash what is read.

    Args:
        on_bytes: called from this thread as tensors arrive, with the bytes read so far and those needed.
        lanes: readers that fill the span's GPU; None on a CPU.
        in_float8: whether FP8 weights stay as they are, and their products are made so (m2ray.model.float8).

    Raises:
        ConfigError: weights that cannot stay FP8.
        CheckpointError: the span's tensors are missing, unknown, misshapen, or overflow the compute dtype.
        StageError: a disk has no room for the layers that are kept there.
        StoreError: reading fails.
    """
    if in_float8:
        require_any(is_any=bool(layout_of(checkpoint.whole_config).methods))
    digests = WeightDigests(checkpoint.headers, len(decoder.skeleton.layers) - 1)
    with PackedLayers(decoder.residency, decoder.offload_folder, decoder.device, decoder.shared) as packed:
        loading = _Loading(checkpoint, decoder, digests, packed, on_bytes, in_float8=in_float8)
        loading.by_lanes(lanes) if lanes is not None else loading.on_cpu()
        on_bytes(checkpoint.bytes_read, loading.needed_bytes)
        packed.bring(decoder.skeleton)
    if in_float8:
        use_float8(decoder.skeleton.model)
    decoder.check_complete()
    return Loaded(loading.needed_bytes, digests.by_layer(), digests.bare_last_layer())


def _match(checkpoint: Checkpoint, decoder: DecoderSpan) -> Iterator[list[MatchedTensor]]:
    return match_by_layer(decoder.skeleton, checkpoint.headers, decoder.span, with_final_norm=decoder.with_final_norm)


def hash_weights(
    checkpoint: Checkpoint, layers_run: int, *, with_final_norm: bool = False, every_layer: bool = False
) -> Mapping[int | None, str]:
    """The digests, as `load_weights` gives them, of what runs before the first layer, at None, and of the last of `layers_run` layers, or of all.

    They are read a few pieces at a time, and nothing is kept.

    Args:
        with_final_norm: whether the run has loaded it, which the model's last layer's digest says.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen.
        StoreError: reading fails.
    """
    skeleton = build_skeleton(checkpoint.whole_config, torch.bfloat16)
    digests = WeightDigests(checkpoint.headers, layers_run - 1)
    span = LayerSpan(0, layers_run)
    matched = chain.from_iterable(match_by_layer(skeleton, checkpoint.headers, span, with_final_norm=with_final_norm))
    hashed = [each for each in matched if every_layer or each.tensor.layer in (None, layers_run - 1)]
    digests.expect(hashed)
    pieces = chain.from_iterable(cut_all(each, torch.empty(each.tensor.shape, device="meta")) for each in hashed)
    _by_threads(partial(_hash, checkpoint, digests), pieces)
    return digests.by_layer()


def _by_threads(work: Callable[[RowsToLoad], None], pieces: Iterable[RowsToLoad], on_piece: Callable[[], None] = lambda: None) -> None:
    """Work on each piece, on a few at a time: what a bucket takes to answer, and a core to hash or convert, is waited for together."""
    with lone_threads(THREADS, "load") as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for piece in pieces:
                if len(waiting) == 2 * THREADS:
                    waiting.popleft().result()
                    on_piece()
                waiting.append(pool.submit(work, piece))
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(decoder: DecoderSpan, fillings: Iterable[_Filling]) -> Iterator[RowsToLoad]:
    """Allocate one model tensor after the other and cut what fills it into pieces."""
    for each in fillings:
        values = each.empty(decoder.device)
        yield from each.cut(values)
        assign(decoder.skeleton.model, each.tensor.tensor.name, values)


def _unplaced(filling: _Filling) -> list[RowsToLoad]:
    """The pieces that fill a tensor, as views of one without memory."""
    return list(filling.cut(filling.empty("meta")))


def _fillings(matched: MatchedTensor, *, in_float8: bool = False) -> list[_Filling]:
    """The tensors that it is loaded as: itself; of a weight that stays FP8, its values and its scales, read in the same pieces."""
    if not (in_float8 and is_packed(matched)):
        return [_Filling(matched, partial(cut_all, matched))]
    values, scales = in_parts(matched)
    return [_Filling(values, partial(cut_values, matched)), _Filling(scales, partial(cut_scales, matched))]


def _load(checkpoint: Checkpoint, digests: WeightDigests, wanted: RowsToLoad) -> None:
    """Read one piece, hash it, convert it and write it into the model; what needs no conversion is read where it belongs."""
    into, parts = wanted.into, {}
    is_as_on_disk = wanted.unpack is None and wanted.values.dtype == into.dtype and into.is_contiguous()
    for name, part in wanted.parts.items():
        parts[name] = into if is_as_on_disk else memory_of(name, part)
        _read(checkpoint, part, parts[name], digests)
    fill(wanted, parts)


def _hash(checkpoint: Checkpoint, digests: WeightDigests, wanted: RowsToLoad) -> None:
    """Read one piece and hash it."""
    for name, part in wanted.parts.items():
        _read(checkpoint, part, memory_of(name, part), digests)


def _read(checkpoint: Checkpoint, piece: Range, out: torch.Tensor, digests: WeightDigests) -> None:
    if piece.num_bytes:
        data = out.view(-1).view(torch.uint8).numpy().data
        checkpoint.read_extent(piece.file, piece.offset, data)
        digests.add([piece], piece.offset, data)


def parameter_bytes(decoder: DecoderSpan) -> int:
    """Bytes of the span's tensors that the checkpoint gave, in memory; computed ones (rotary frequencies) do not count."""
    tensors = decoder.skeleton.model.state_dict().values()
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors if not tensor.is_meta)
