"""What was loaded of each layer, as one digest a layer that depends on the checkpoint's tensors alone.

Neither the cut into stages, nor devices, extents, offload or the order of reading change it. What goes to a GPU is hashed there, a piece of a
tensor at a time (m2ray.model.gpu_hashes). Elsewhere readers hash what they have just read, each on its own thread; xxh3 takes 10 to 25 GB/s
of a core, and lets go of the interpreter meanwhile.

A layer's digest, and that of what runs before the first layer, is xxh3-128, 32 hex digits, over its checkpoint tensors in the order of
their names. Of each: its line `NAME DTYPE SHAPE`, as safetensors spells the dtype and Python the list of sizes, ended by a newline,
and then the xxh3-128 of each of its pieces, 16 bytes each, big-endian. `m2ray.model.pieces.PIECE_BYTES` tells what a piece is; scales and
other parts of quantised tensors are tensors of their own, and cut where their weights are.
"""

from collections.abc import Iterable, Mapping

import xxhash

from m2ray.model.extents import Range
from m2ray.model.headers import DTYPES, TensorHeader
from m2ray.model.tensors import MatchedTensor

BARE_LAST_LAYER = -1
"""Where a chain's digests have that of the model's last layer without the final norm, if that was loaded: of a run that does not take the norm."""


def of_run(loaded: Mapping[int | None, str], num_layers: int, *, with_final_norm: bool) -> dict[int | None, str]:
    """What a chain has loaded of a run's `num_layers` layers: one that stands may have more, and the final norm where the run does not take it."""
    found = {layer: digest for layer, digest in loaded.items() if layer is None or 0 <= layer < num_layers}
    if BARE_LAST_LAYER in loaded and not with_final_norm and num_layers not in loaded:
        found[num_layers - 1] = loaded[BARE_LAST_LAYER]
    return found


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightDigests:
    """Takes in what is read of a span, in any order and from several threads, and gives each layer's digest once all is there.

    A final norm that is loaded counts to `last_layer`, the model's.
    """

    def __init__(self, headers: Mapping[str, TensorHeader], last_layer: int) -> None:
        self._headers = headers
        self._last_layer = last_layer
        self._keys: dict[int | None, set[str]] = {}
        self._norm_keys: set[str] = set()
        self._pieces: dict[tuple[str, int], tuple[int, bytes]] = {}
        """By file and offset: bytes and digest."""
        self._begun: dict[tuple[str, int], xxhash.xxh3_128] = {}

    def expect(self, matched: Iterable[MatchedTensor]) -> None:
        """These tensors will be read, with all their parts."""
        for filling in matched:
            tensor = filling.tensor
            keys = self._keys.setdefault(self._last_layer if tensor.role == "final_norm" else tensor.layer, set())
            found = {part.key for stored in filling.stored for part in stored.parts}
            keys.update(found)
            if tensor.role == "final_norm":
                self._norm_keys |= found

    def add(self, pieces: Iterable[Range], offset: int, data: memoryview) -> None:
        """Hash what of these pieces lies in `data`, the bytes of their file from `offset` on.

        A piece that lies in several runs of bytes gets them one after the other.
        """
        for piece in pieces:
            begin, stop = max(piece.offset, offset), min(piece.stop, offset + len(data))
            if begin >= stop:
                continue
            place, found = (piece.file, piece.offset), data[begin - offset : stop - offset]
            if stop - begin == piece.num_bytes:
                self._pieces[place] = (piece.num_bytes, xxhash.xxh3_128_digest(found))
                continue
            hashed = self._begun.setdefault(place, xxhash.xxh3_128())
            hashed.update(found)
            if stop == piece.stop:
                self._pieces[place] = (piece.num_bytes, self._begun.pop(place).digest())

    def put(self, piece: Range, digest: bytes) -> None:
        """A piece that was hashed elsewhere: its xxh3-128, 16 bytes."""
        self._pieces[piece.file, piece.offset] = (piece.num_bytes, digest)

    def of(self, piece: Range) -> bytes:
        """The digest of a piece that was hashed."""
        return self._pieces[piece.file, piece.offset][1]

    def by_layer(self) -> dict[int | None, str]:
        """The digest of each layer, and at None that of what runs before the first one, if the span has it."""
        return {layer: self._digest(keys) for layer, keys in self._keys.items()}

    def bare_last_layer(self) -> str | None:
        """The digest of the model's last layer without the final norm; None where no norm was loaded."""
        return self._digest(self._keys[self._last_layer] - self._norm_keys) if self._norm_keys else None

    def _digest(self, keys: Iterable[str]) -> str:
        lines: list[bytes] = []
        for key in sorted(keys):
            header = self._headers[key]
            lines.append(f"{key} {_NAMES[header.dtype]} {list(header.shape)}\n".encode())
            at, stop = header.offset, header.offset + header.num_bytes
            while at < stop:
                num_bytes, digest = self._pieces[header.file, at]
                lines.append(digest)
                at += num_bytes
            assert at == stop, f"{key} was not read as a whole"
        return xxhash.xxh3_128_hexdigest(b"".join(lines))
