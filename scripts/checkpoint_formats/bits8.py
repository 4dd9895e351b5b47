"""The formats with 8 bits a value but `fp8` in blocks, which make_checkpoint.py has itself: its bf16 twin rests on the same numbers."""

from collections.abc import Iterable
from math import prod
from typing import Literal

from scripts.checkpoint_formats.compressed import compressed
from scripts.checkpoint_formats.fills import E4M3_RMS, INT8_RMS, codes, e4m3, exponents, one, scales
from scripts.checkpoint_formats.format import Config, Format, part
from scripts.checkpoint_formats.stored import BLOCK, Fill, Piece, StoredTensor

KEPT = ["gate", "router", "lm_head"]


class StaticFp8(Format):
    """One scale a tensor and one for its activations, as Mistral's."""

    def quantization_config(self) -> Config:
        said = {"activation_scheme": "static", "dequantize": False, "weight_block_size": None}
        return {"quant_method": "fp8", "modules_to_not_convert": KEPT} | said

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        yield part(piece, "", "F8_E4M3", piece.shape, e4m3(prod(piece.shape)))
        yield part(piece, "_scale_inv", "BF16", (), one(1 / E4M3_RMS, 1, "BF16"))
        yield part(piece, ".activation_scale", "BF16", (), one(0.01, dtype="BF16"))


class Exponents(Format):
    """Scales that are powers of two: MXFP8's of 32 values of a row, or DeepSeek's of a block, which it stores as `.scale`."""

    def __init__(self, *, in_blocks: bool = False) -> None:
        self._in_blocks = in_blocks

    def quantization_config(self) -> Config:
        said = {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0"}
        if self._in_blocks:
            return {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": KEPT} | said
        return {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": KEPT} | said

    @property
    def multiple_of(self) -> tuple[int, int]:  # type: ignore[override]
        return (1, 1) if self._in_blocks else (1, 32)

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        grid = piece.grid if self._in_blocks else (rows, columns // 32)
        ending, dtype = (".scale", "F8_E8M0") if self._in_blocks else ("_scale_inv", "U8")
        yield part(piece, "", "F8_E4M3", piece.shape, e4m3(prod(piece.shape)))
        yield part(piece, ending, dtype, grid, exponents(prod(grid), E4M3_RMS))


class Compressed(Format):
    """compressed-tensors `float-quantized` and `int-quantized`, a scale a tensor, a channel (a row) or a block."""

    def __init__(self, kind: Literal["float", "int"], strategy: Literal["tensor", "channel", "block"]) -> None:
        self._kind, self._strategy = kind, strategy

    def quantization_config(self) -> Config:
        weights: Config = {"num_bits": 8, "type": self._kind, "symmetric": True, "strategy": self._strategy, "dynamic": False}
        if self._strategy == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        return compressed(f"{self._kind}-quantized", weights)

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        grid = {"tensor": (1,), "channel": (rows, 1), "block": piece.grid}[self._strategy]
        dtype, rms = ("F8_E4M3", E4M3_RMS) if self._kind == "float" else ("I8", INT8_RMS)
        fill: Fill = e4m3(rows * columns) if self._kind == "float" else codes(rows * columns)
        yield part(piece, "", dtype, piece.shape, fill)
        yield part(piece, ".weight_scale", "BF16", grid, scales(prod(grid), "BF16", rms))


class ModelOptFp8(Format):
    """NVIDIA ModelOpt's FP8, a scale a tensor."""

    def quantization_config(self) -> Config:
        producer = {"name": "modelopt", "version": "0.47.0"}
        return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.gate", "*.router"], "producer": producer}

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        yield part(piece, "", "F8_E4M3", piece.shape, e4m3(prod(piece.shape)))
        yield part(piece, ".weight_scale", "F32", (), one(1 / E4M3_RMS, 1))
        yield part(piece, ".input_scale", "F32", (), one(0.01))
