"""MXFP4: FP4 codes, and for every 32 of them one scale that is a power of two."""

from collections.abc import Mapping

import torch

from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.codes_on_cpu import write_by_pairs
from m2ray.model.quantization.nibbles import Codes, NibbleUnpack, in_cache, look_up
from m2ray.model.quantization.packed import Found, Packed, Piece
from m2ray.model.quantization.scaled import EXPONENT_SCALES
from m2ray.model.quantization.scaling import as_floats
from m2ray.model.quantization.stored import Shape, Unpack

GROUP = 32
"""Values a scale."""


def unpack(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]. The product of an FP4 value and a power of two is exact, but for the smallest and largest scales.

    As transformers 5.24 (`Fp8Dequantize`, for DeepSeek-V4's experts; `Mxfp4Dequantize`, for gpt-oss's) and compressed-tensors 0.20
    (`mxfp4-pack-quantized`) compute it.

    Args:
        packed: two codes a byte, [..., columns / 2], contiguous.
        scale: uint8 or float8_e8m0fnu [..., columns / 32].
    """
    codes, factors = packed.reshape(-1, packed.shape[-1]), as_floats(scale).to(torch.bfloat16).reshape(-1, scale.shape[-1], 1)

    def rows_of(first: int, stop: int) -> torch.Tensor:
        values: torch.Tensor = look_up(codes[first:stop], Codes.E2M1, torch.bfloat16).unflatten(-1, (-1, GROUP))
        return values.mul_(factors[first:stop]).flatten(-2)

    shape = (codes.shape[0], 2 * codes.shape[1])
    return in_cache(rows_of, shape, torch.bfloat16, packed.device).view(*packed.shape[:-1], -1)


class Mxfp4(Packed):
    """MXFP4 of matrices [rows, columns], two codes a byte along a row.

    Args:
        parts: the endings of "values" and "scale".
        dtype: of the bytes with the codes.
    """

    name = "MXFP4 in groups of 32"
    multiples = (1, GROUP)

    def __init__(self, values: str, scale: str, dtype: torch.dtype = torch.uint8) -> None:
        self.parts = {"values": (values,), "scale": (scale,)}
        self._dtype = dtype

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == self._dtype and len(values.shape) >= 2

    def shape_of(self, found: Found) -> Shape:
        *before, packed = found["values"][1].shape
        return (*before, 2 * packed)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        *before, columns = shape
        return {
            "values": Piece((*before, -(-columns // 2)), (self._dtype,)),
            "scale": Piece((*before, -(-columns // GROUP)), EXPONENT_SCALES[::-1]),
        }

    def unpacking(self) -> Unpack:
        return NibbleUnpack(unpack_parts, Codes.E2M1, (1, GROUP), on_cpu=_write)


class GptOssExperts(Mxfp4):
    """gpt-oss's experts, [experts, columns, rows] in the model: on disk each is transposed, its groups an axis of their own."""

    swapped = (1, 2)
    multiples = (1, 1)

    def __init__(self) -> None:
        super().__init__("_blocks", "_scales")

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == torch.uint8 and len(values.shape) == 4

    def shape_of(self, found: Found) -> Shape:
        experts, rows, groups, packed = found["values"][1].shape
        return (experts, groups * packed * 2, rows)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        experts, columns, rows = shape
        groups = -(-columns // GROUP)
        return {
            "values": Piece((experts, rows, groups, GROUP // 2), (torch.uint8,)),
            "scale": Piece((experts, rows, groups), (torch.uint8,)),
        }


def unpack_parts(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`unpack` of the parts, of which gpt-oss's codes have their groups as an axis."""
    codes, scale = parts["values"], parts["scale"]
    return unpack(codes.flatten(-2) if codes.dim() > scale.dim() else codes, scale)


def _write(parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> bool:
    return write_by_pairs(parts, unpack_parts, GROUP, into)


GPT_OSS = GptOssExperts()
COMPRESSED = Mxfp4(".weight_packed", ".weight_scale")
DEEPSEEK_V4 = Mxfp4("", ".scale", torch.int8)
