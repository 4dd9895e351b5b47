"""AWQ (version "gemm"), 4 bits: int32 words of eight numbers along the output features, in an order of their own, with zero points.

As autoawq 0.2.9 computes it (`dequantize_gemm`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from m2ray.errors import CheckpointError, raise_all
from m2ray.model.headers import TensorHeader
from m2ray.model.limits import short_repr
from m2ray.model.quantization.codes_on_cpu import write_numbers
from m2ray.model.quantization.int4 import unpack_words
from m2ray.model.quantization.nibbles import ALL, Codes, NibbleUnpack
from m2ray.model.quantization.packed import Found, Packed, Piece
from m2ray.model.quantization.stored import Shape, Unpack


def unpack(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight, a view, [out_features, in_features] in the dtype of `scales`: (number - zero point) * scale, rounded there.

    Args:
        qweight: int32 [in_features, out_features / 8].
        qzeros: int32 [groups, out_features / 8].
        scales: float16 [groups, out_features].
    """
    grouped: torch.Tensor = unpack_words(_in_order(qweight), torch.float32).unflatten(0, (scales.shape[0], -1))
    zeros = unpack_words(_in_order(qzeros), torch.float32)
    return grouped.sub_(zeros.unsqueeze(1)).mul_(scales.float().unsqueeze(1)).flatten(0, 1).to(scales.dtype).t()


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 words with their features in order: stored, a word holds 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    return _apart(words & 0xFFFF) | (_apart(words >> 16 & 0xFFFF) << 4)


def _apart(halves: torch.Tensor) -> torch.Tensor:
    """The four numbers of four bits that lie in the low half of each word, at every other place of it."""
    halves = (halves | halves << 8) & 0x00FF00FF
    return (halves | halves << 4) & 0x0F0F0F0F


def _unpack_parts(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight = unpack(parts["values"], parts["zero_point"], parts["scale"]).t()
    return weight.float().to(torch.bfloat16)  # float16 straight to bfloat16 takes a CPU four times as long


_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In a word, of each of its eight features."""

_FEATURES = 512
"""Whose words are turned at one time on a CPU: 256 bytes of each row."""


def _turned(words: torch.Tensor) -> torch.Tensor:
    """int32 [features, inputs / 8], eight inputs a word in their order, of [inputs, features / 8]: 8 x 8 numbers at a time are transposed."""
    eights = words.unflatten(0, (-1, 8)).transpose(0, 1).contiguous()
    for apart, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        low, high = eights.unflatten(0, (-1, 2, apart)).unbind(1)
        differing = (low >> 4 * apart ^ high) & mask
        high ^= differing
        low ^= differing << 4 * apart
    matrix = eights[list(_PLACES)].view(words.shape)
    turned: torch.Tensor = matrix.t().contiguous().view(-1, len(words) // 8)  # a whole matrix alone is transposed fast
    return turned


class Awq(Packed):
    """Linear layers [out_features, in_features], on disk transposed.

    Attributes:
        group: input features that share a scale and a zero point; None where all do.
    """

    swapped = (0, 1)

    def __init__(self, group: int | None) -> None:
        self.group, self.multiples = group, (8, group or 1)
        self.name = f"AWQ, INT4 {f'in groups of {group}' if group else 'by row'} with zero points"
        self.parts = {"values": (".qweight",), "zero_point": (".qzeros",), "scale": (".scales",)}

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == torch.int32 and len(values.shape) == 2

    def shape_of(self, found: Found) -> Shape:
        columns, words = found["values"][1].shape
        return (words * 8, columns)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        rows, columns = shape
        group = self.group or max(columns, 1)
        return {
            "values": Piece((columns, rows // 8), (torch.int32,)),
            "zero_point": Piece((-(-columns // group), rows // 8), (torch.int32,), rows=group),
            "scale": Piece((-(-columns // group), rows), (torch.float16, torch.bfloat16, torch.float32), rows=group),
        }

    def unpacking(self) -> Unpack:
        return NibbleUnpack(_unpack_parts, Codes.UNSIGNED, (self.group or ALL, 1), is_interleaved=True, on_cpu=self._write)

    def _write(self, parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> bool:
        words, weight = parts["values"], into.t()
        if len(words) % 8:
            return False
        scale, zeros = parts["scale"].t().contiguous(), unpack_words(_in_order(parts["zero_point"]), torch.float32).t().contiguous()
        for first in range(0, len(weight), _FEATURES):
            of = slice(first, first + _FEATURES)
            turned = _turned(words[:, first // 8 : (first + _FEATURES) // 8])
            if not write_numbers(turned, Codes.UNSIGNED, scale[of], zeros[of], self.group, weight[of]):
                return False
        return True


def of_config(declared: Mapping[str, Any]) -> Awq:
    """The method that `quantization_config` names. Raises CheckpointError: another kind of AWQ."""
    expected = {"bits": 4, "zero_point": True, "version": "gemm"}
    problems: list[CheckpointError] = []
    name, kind = format_of(declared, ("version", "checkpoint_format", "format"), "AWQ", problems)
    said = {
        "bits": declared.get("bits", declared.get("w_bit", 4)),
        "zero_point": declared.get("zero_point", True),
        "version": kind or "gemm",
    }
    problems += [
        CheckpointError(
            f"config.json: AWQ with {name if field == 'version' else field} = {short_repr(said[field])}.", f"m2ray reads it with {value!r}."
        )
        for field, value in expected.items()
        if said[field] != value
    ]
    group = group_of(declared, "AWQ", problems)
    raise_all(problems)
    return Awq(group)


def format_of(declared: Mapping[str, Any], names: Sequence[str], method: str, problems: list[CheckpointError]) -> tuple[str, str | None]:
    """(the first of a field's names that the configuration has, what it says), in small letters; None without any.

    Names that say different things go to `problems`: transformers takes one of them, and gptqmodel another.
    """
    said = {name: str(declared[name]).lower() for name in names if declared.get(name) is not None}
    if len(set(said.values())) > 1:
        told = " and ".join(f"{name} = {short_repr(kind)}" for name, kind in said.items())
        problems.append(CheckpointError(f"config.json: {method} with {told}, which contradict each other.", "Keep the one that is true."))
    return next(iter(said.items()), (names[0], None))


def group_of(declared: Mapping[str, Any], kind: str, problems: list[CheckpointError]) -> int | None:
    """`group_size` of the configuration, -1 being None: a scale for all input features. What is wrong with it goes to `problems`."""
    group = declared.get("group_size", declared.get("q_group_size", 128))
    if group == -1:
        return None
    if type(group) is not int or group < 1:
        problems.append(CheckpointError(f"config.json: {kind} with group_size = {short_repr(group)}.", "It is a count, or -1."))
        return None
    return group
