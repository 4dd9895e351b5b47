"""The formats with whole numbers of 4 bits in int32 words."""

from collections.abc import Iterable

from scripts.checkpoint_formats.compressed import compressed
from scripts.checkpoint_formats.fills import INT4_RMS, codes, groups_in_order, groups_in_random_order, nibbles, numbers, scales
from scripts.checkpoint_formats.format import Config, Format, part
from scripts.checkpoint_formats.stored import Piece, StoredTensor

GROUP = 32
KEPT = ["gate", "router", "lm_head"]


class PackQuantized(Format):
    """compressed-tensors `pack-quantized`."""

    multiple_of = (1, GROUP)

    def __init__(self, *, symmetric: bool = True) -> None:
        self._symmetric = symmetric

    def quantization_config(self) -> Config:
        weights = {"num_bits": 4, "type": "int", "symmetric": self._symmetric, "strategy": "group", "group_size": GROUP}
        return compressed("pack-quantized", weights)

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        groups, words = columns // GROUP, -(-rows // 8)
        yield part(piece, ".weight_packed", "I32", (rows, columns // 8), codes(rows * columns // 2))
        yield part(piece, ".weight_scale", "BF16", (rows, groups), scales(rows * groups, "BF16", INT4_RMS))
        yield part(piece, ".weight_shape", "I64", (2,), numbers((rows, columns)))
        if not self._symmetric:
            yield part(piece, ".weight_zero_point", "I32", (words, groups), nibbles(words * groups * 4, 6, 4))


class Awq(Format):
    """AWQ, version "gemm"."""

    multiple_of = (8, GROUP)

    def quantization_config(self) -> Config:
        said = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", "modules_to_not_convert": KEPT} | said

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        groups = columns // GROUP
        yield part(piece, ".qweight", "I32", (columns, rows // 8), codes(rows * columns // 2))
        yield part(piece, ".qzeros", "I32", (groups, rows // 8), nibbles(groups * rows // 2, 6, 4))
        yield part(piece, ".scales", "F16", (groups, rows), scales(groups * rows, "F16", INT4_RMS))


class Gptq(Format):
    """GPTQ: its zero points one less than they are and its groups in the order of activations, or neither."""

    multiple_of = (8, GROUP)

    def __init__(self, *, in_order: bool = False) -> None:
        self._in_order = in_order

    def quantization_config(self) -> Config:
        said: Config = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": not self._in_order}
        kind = {"format": "gptq_v2"} if self._in_order else {"checkpoint_format": "gptq"}  # as it is called now, and as it was
        return {"quant_method": "gptq", "modules_to_not_convert": KEPT} | said | kind

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        groups = columns // GROUP
        yield part(piece, ".qweight", "I32", (columns // 8, rows), codes(rows * columns // 2))
        yield part(piece, ".qzeros", "I32", (groups, rows // 8), nibbles(groups * rows // 2, 6, 4))
        yield part(piece, ".scales", "F16", (groups, rows), scales(groups * rows, "F16", INT4_RMS))
        order = groups_in_order if self._in_order else groups_in_random_order
        yield part(piece, ".g_idx", "I32", (columns,), order(columns, GROUP))
