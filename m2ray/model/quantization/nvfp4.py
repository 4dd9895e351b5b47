"""NVFP4: FP4 codes, an e4m3 scale for every 16 of them, and one float32 scale a tensor."""

from collections.abc import Callable, Mapping

import torch

from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.codes_on_cpu import write_by_pairs
from m2ray.model.quantization.nibbles import Codes, NibbleUnpack, in_cache, look_up
from m2ray.model.quantization.packed import Found, Packed, Piece
from m2ray.model.quantization.scaling import as_floats
from m2ray.model.quantization.stored import Shape, Unpack

GROUP = 16
"""Values a scale."""


def unpack_modelopt(packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]: value * (scale * tensor_scale) in float32, rounded once. Code 8 is 0.0.

    As nvidia-modelopt 0.47 computes it (`NVFP4QTensor.dequantize`).

    Args:
        packed: two codes a byte, uint8 [..., columns / 2], contiguous: `weight`.
        scale: float8_e4m3fn [..., columns / 16]: `weight_scale`.
        tensor_scale: float32, one number: `weight_scale_2`.
    """
    return _scaled(packed, Codes.E2M1_WITHOUT_NEGATIVE_ZERO, as_floats(scale) * tensor_scale.reshape(()))


def unpack_compressed(packed: torch.Tensor, scale: torch.Tensor, tensor_divisor: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., columns]: value * (scale / tensor_divisor) in float32, rounded once.

    As compressed-tensors 0.20 computes it (`nvfp4-pack-quantized`).

    Args:
        packed: two codes a byte, uint8 [..., columns / 2], contiguous: `weight_packed`.
        scale: float8_e4m3fn [..., columns / 16]: `weight_scale`.
        tensor_divisor: float32, one number: `weight_global_scale`.
    """
    return _scaled(packed, Codes.E2M1, as_floats(scale) / tensor_divisor.reshape(()))


def _scaled(packed: torch.Tensor, meaning: Codes, factors: torch.Tensor) -> torch.Tensor:
    """Each group of the codes' values times its factor, in float32."""
    codes, by_group = packed.reshape(-1, packed.shape[-1]), factors.reshape(-1, factors.shape[-1], 1)

    def rows_of(first: int, stop: int) -> torch.Tensor:
        grouped: torch.Tensor = look_up(codes[first:stop], meaning, torch.float32).unflatten(-1, (-1, GROUP))
        return grouped.mul_(by_group[first:stop]).flatten(-2)

    shape = (codes.shape[0], 2 * codes.shape[1])
    return in_cache(rows_of, shape, torch.bfloat16, packed.device).view(*packed.shape[:-1], -1)


class Nvfp4(Packed):
    """NVFP4 of matrices [rows, columns], two codes a byte along a row.

    Args:
        endings: of "values", "scale" and "tensor_scale".
        unpack: makes the weight of these three.
        codes: what codes stand for.
        is_divided: whether scales are divided by the tensor's own, not multiplied.
    """

    name = "NVFP4 in groups of 16"
    multiples = (1, GROUP)

    def __init__(
        self,
        endings: tuple[str, str, str],
        unpack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        codes: Codes,
        *,
        is_divided: bool,
    ) -> None:
        self.parts = {name: (ending,) for name, ending in zip(("values", "scale", "tensor_scale"), endings, strict=True)}
        self._unpack, self._codes, self._is_divided = unpack, codes, is_divided

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == torch.uint8 and len(values.shape) >= 2

    def shape_of(self, found: Found) -> Shape:
        *before, packed = found["values"][1].shape
        return (*before, 2 * packed)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        *before, columns = shape
        return {
            "values": Piece((*before, -(-columns // 2)), (torch.uint8,)),
            "scale": Piece((*before, -(-columns // GROUP)), (torch.float8_e4m3fn,)),
            "tensor_scale": Piece((), (torch.float32,), rows=0),
        }

    def unpacking(self) -> Unpack:
        return NibbleUnpack(self._unpack_parts, self._codes, (1, GROUP), is_divided=self._is_divided, on_cpu=self._write)

    def _unpack_parts(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._unpack(parts["values"], parts["scale"], parts["tensor_scale"])

    def _write(self, parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> bool:
        return write_by_pairs(parts, self._unpack_parts, GROUP, into)


MODELOPT = Nvfp4(("", "_scale", "_scale_2"), unpack_modelopt, Codes.E2M1_WITHOUT_NEGATIVE_ZERO, is_divided=False)
COMPRESSED = Nvfp4((".weight_packed", ".weight_scale", ".weight_global_scale"), unpack_compressed, Codes.E2M1, is_divided=True)
