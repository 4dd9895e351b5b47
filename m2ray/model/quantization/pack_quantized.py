"""compressed-tensors `pack-quantized`: whole numbers of 4 or 8 bits in int32 words along a row, with a scale a group, row or tensor.

As compressed-tensors 0.20 computes it (`PackedQuantizationCompressor`).
"""

from collections.abc import Mapping

import torch

from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.codes_on_cpu import write_numbers
from m2ray.model.quantization.int4 import unpack_words
from m2ray.model.quantization.nibbles import ALL, Codes, NibbleUnpack
from m2ray.model.quantization.packed import Found, Packed, Piece
from m2ray.model.quantization.stored import Shape, Unpack

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def unpack(
    packed: torch.Tensor, scale: torch.Tensor, columns: int, *, bits: int = 4, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """[rows, columns] in the dtype of `scale`: (number - zero point) * scale, rounded there.

    Args:
        packed: `weight_packed`, int32 [rows, words], contiguous; a row's last word may not be full.
        scale: `weight_scale`, [rows, groups], [rows, 1] or one number.
        columns: of the weight, a multiple of the groups.
        bits: 4 or 8 a number, stored with half of its range added.
        zero_point: `weight_zero_point`, int32 [ceil(rows * bits / 32), groups], packed along the rows; None where they are all 0.
    """
    rows, groups = packed.shape[0], scale.shape[-1] if scale.dim() > 1 else 1
    middle = 1 << (bits - 1) if zero_point is None else 0
    numbers: torch.Tensor = unpack_words(packed, scale.dtype, bits, middle)[:, :columns].unflatten(-1, (groups, -1))
    if zero_point is not None:
        numbers.sub_(unpack_words(zero_point.t().contiguous(), scale.dtype, bits).t()[:rows].unsqueeze(-1))
    return numbers.mul_(scale.reshape(-1, groups).unsqueeze(-1)).flatten(-2)


class PackQuantized(Packed):
    """Matrices [rows, columns] of one group of compressed-tensors' configuration.

    Attributes:
        group: columns that share a scale; None where a row has one, or the tensor.
        is_symmetric: whether all zero points are 0 and none is stored.
        is_by_tensor: whether the tensor has one scale.
    """

    def __init__(self, group: int | None, bits: int = 4, *, is_symmetric: bool = True, is_by_tensor: bool = False) -> None:
        self.group, self.bits, self.is_symmetric, self.is_by_tensor = group, bits, is_symmetric, is_by_tensor
        share = f"in groups of {group}" if group else f"a scale a {'tensor' if is_by_tensor else 'row'}"
        self.name = f"INT{bits} {share}{'' if is_symmetric else ' with zero points'} (compressed-tensors)"
        self.parts = {"values": (".weight_packed",), "scale": (".weight_scale",), "shape": (".weight_shape",)}
        if not is_symmetric:
            self.parts |= {"zero_point": (".weight_zero_point",)}

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == torch.int32 and len(values.shape) == 2

    def shape_of(self, found: Found) -> Shape:
        rows, words = found["values"][1].shape
        scale = found["scale"][1].shape if "scale" in found else ()
        columns = scale[1] * self.group if self.group and len(scale) == 2 else words * 32 // self.bits
        return (rows, columns)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        rows, columns = shape
        groups, a_word = -(-columns // self.group) if self.group else 1, 32 // self.bits
        scale = Piece((), FLOATS, rows=0) if self.is_by_tensor else Piece((rows, groups), FLOATS)
        pieces = {
            "values": Piece((rows, -(-columns // a_word)), (torch.int32,)),
            "scale": scale,
            "shape": Piece((2,), (torch.int64, torch.int32), rows=0),
        }
        if not self.is_symmetric:
            pieces["zero_point"] = Piece((-(-rows // a_word), groups), (torch.int32,), rows=a_word)
        return pieces

    def unpacking(self) -> Unpack:
        if self.bits != 4:
            return self._unpack_parts
        block = (ALL, ALL) if self.is_by_tensor else (1, self.group or ALL)
        codes = Codes.LESS_8 if self.is_symmetric else Codes.UNSIGNED
        return NibbleUnpack(self._unpack_parts, codes, block, zero_word_rows=8, on_cpu=self._write)

    def _unpack_parts(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = parts["scale"]
        columns = scale.shape[1] * self.group if self.group else parts["values"].shape[1] * 32 // self.bits
        weight = unpack(parts["values"], scale, columns, bits=self.bits, zero_point=parts.get("zero_point"))
        return weight.float().to(torch.bfloat16) if weight.dtype == torch.float16 else weight.to(torch.bfloat16)

    def _write(self, parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> bool:
        words, rows = parts["values"], len(into)
        if words.shape[1] * 8 != into.shape[1]:
            return False
        scale = parts["scale"].reshape(-1, parts["scale"].shape[-1] if self.group else 1).expand(rows, -1).contiguous()
        zeros = None
        if not self.is_symmetric:
            zeros = unpack_words(parts["zero_point"].t().contiguous(), torch.float32).t()[:rows].contiguous()
        meaning = Codes.LESS_8 if zeros is None else Codes.UNSIGNED
        return write_numbers(words, meaning, scale, zeros, self.group, into)
