"""DeepSeek-V4's own format."""

from collections.abc import Iterable

from scripts.checkpoint_formats.bits8 import Exponents
from scripts.checkpoint_formats.fills import E2M1_RMS, codes, exponents
from scripts.checkpoint_formats.format import Config, part
from scripts.checkpoint_formats.stored import Piece, StoredTensor


class DeepSeekV4(Exponents):
    """DeepSeek-V4's: FP8 in blocks, and its experts in FP4, all under scales that are powers of two."""

    def __init__(self) -> None:
        super().__init__(in_blocks=True)

    def quantization_config(self) -> Config:
        return super().quantization_config() | {"expert_dtype": "fp4"}

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        if piece.number("experts") is None:
            yield from super().tensors(piece)
            return
        rows, columns = piece.shape
        yield part(piece, "", "I8", (rows, columns // 2), codes(rows * columns // 2))
        yield part(piece, ".scale", "F8_E8M0", (rows, columns // 32), exponents(rows * columns // 32, E2M1_RMS))
