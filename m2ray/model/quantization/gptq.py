"""GPTQ, 4 bits: int32 words of eight numbers along the input features, and for each input feature the number of its group.

As gptqmodel 7.7 computes it (`TorchLinear.dequantize_weight`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from m2ray.errors import CheckpointError, raise_all
from m2ray.model.headers import TensorHeader
from m2ray.model.limits import short_repr
from m2ray.model.quantization.awq import format_of, group_of
from m2ray.model.quantization.codes_on_cpu import write_numbers
from m2ray.model.quantization.int4 import unpack_words
from m2ray.model.quantization.nibbles import ALL, Codes, NibbleUnpack, in_cache
from m2ray.model.quantization.packed import Found, Packed, Piece
from m2ray.model.quantization.scratch import scratch_tensor
from m2ray.model.quantization.stored import MISMATCH, Shape, Unpack

ONE_LESS = 0x11111111
"""What the format "gptq" took from each word of zero points, and "gptq_v2" does not. A borrow goes from one number to the next."""


def unpack(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    *,
    zeros_one_less: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer's weight [out_features, in_features]: (number - zero point) * scale, rounded in the dtype of `scales`, float16.

    Args:
        qweight: int32 [in_features / 8, out_features].
        qzeros: int32 [groups, out_features / 8].
        scales: float16 [groups, out_features].
        g_idx: int32 [in_features], each input feature's group, in any order.
        zeros_one_less: whether `qzeros` are one less than the zero points, as the format "gptq" has them.
        dtype: what the result is rounded to then; None for that of `scales`.
    """
    groups = g_idx.int()
    zeros = unpack_words(qzeros + ONE_LESS if zeros_one_less else qzeros, torch.float32).t().contiguous()
    factors = scales.float().t().contiguous()

    def rows_of(first: int, stop: int) -> torch.Tensor:
        numbers = unpack_words(qweight[:, first:stop].t().contiguous(), torch.float32)
        numbers.sub_(zeros[first:stop].index_select(1, groups)).mul_(factors[first:stop].index_select(1, groups))
        return numbers.to(scales.dtype).float()  # float16 straight to bfloat16 takes a CPU four times as long

    return in_cache(rows_of, (qweight.shape[1], len(groups)), dtype or scales.dtype, qweight.device)


class Gptq(Packed):
    """Linear layers [out_features, in_features], on disk transposed.

    Attributes:
        group: input features that share a scale and a zero point; None where all do.
        zeros_one_less: as `unpack` takes it.
        in_order: whether groups are of neighbours, one after the other. Else a piece may need any group's scales, and a tensor is read whole.
    """

    swapped = (0, 1)
    multiples = (8, 8)

    def __init__(self, group: int | None, *, zeros_one_less: bool = True, in_order: bool = False) -> None:
        self.group, self.zeros_one_less, self.in_order = group, zeros_one_less, in_order
        self.name = f"GPTQ, INT4 {f'in groups of {group}' if group else 'by row'} with zero points"
        self.parts = {"values": (".qweight",), "zero_point": (".qzeros",), "scale": (".scales",), "group": (".g_idx",)}

    def takes(self, values: TensorHeader) -> bool:
        return values.dtype == torch.int32 and len(values.shape) == 2

    def shape_of(self, found: Found) -> Shape:
        words, rows = found["values"][1].shape
        return (rows, words * 8)

    def pieces(self, shape: Shape) -> Mapping[str, Piece]:
        rows, columns = shape
        group = self.group or max(columns, 1)
        groups, apart = -(-columns // group), group if self.in_order else 0
        return {
            "values": Piece((columns // 8, rows), (torch.int32,), rows=8 if self.in_order else 0),
            "zero_point": Piece((groups, rows // 8), (torch.int32,), rows=apart),
            "scale": Piece((groups, rows), (torch.float16, torch.bfloat16, torch.float32), rows=apart),
            "group": Piece((columns,), (torch.int32,), rows=0),  # all of it: a piece alone does not show which groups are its own
        }

    def unpacking(self) -> Unpack:
        return NibbleUnpack(
            self._unpack_parts,
            Codes.UNSIGNED,
            (self.group or ALL, 1),
            word_rows=8,
            zero_more=ONE_LESS if self.zeros_one_less else 0,
            has_group_index=not self.in_order,
            check=self._check,
            on_cpu=self._write if self.in_order else None,
        )

    def _unpack_parts(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._check(parts)
        groups = parts["group"]
        if self.in_order:
            groups = self._in_order(groups)[: 8 * len(parts["values"])]  # a piece begins with a group
        return unpack(
            parts["values"],
            parts["zero_point"],
            parts["scale"],
            groups,
            zeros_one_less=self.zeros_one_less,
            dtype=torch.bfloat16,
        ).t()

    def _write(self, parts: Mapping[str, torch.Tensor], into: torch.Tensor) -> bool:
        self._check(parts)
        words, zeros = parts["values"], parts["zero_point"]
        of_groups = unpack_words(zeros + ONE_LESS if self.zeros_one_less else zeros, torch.float32).t().contiguous()
        turned = scratch_tensor("turned", torch.int32, *words.shape[::-1])
        turned.copy_(words.t())  # whole: of columns alone it takes three times as long
        return write_numbers(turned, Codes.UNSIGNED, parts["scale"].t().contiguous(), of_groups, self.group, into.t())

    def _check(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises CheckpointError: groups that there are not, or in another order than config.json says."""
        groups, count = parts["group"], len(parts["scale"])
        if self.in_order:
            if not torch.equal(groups, self._in_order(groups)):
                what = "config.json: GPTQ with desc_act = false, but g_idx has the groups in an order of their own."
                raise CheckpointError(what, "Set desc_act to true: then each input feature has the group that g_idx names.")
        elif groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise CheckpointError(
                f"GPTQ's g_idx names groups from {int(groups.min())} to {int(groups.max())}; there are {count}.", MISMATCH
            )

    def _in_order(self, groups: torch.Tensor) -> torch.Tensor:
        """The groups of so many features where they are of neighbours, one after the other."""
        return (torch.arange(len(groups), device=groups.device) // (self.group or max(len(groups), 1))).int()


_ZEROS_ONE_LESS = {"gptq": True, "gptq_v2": False}
"""By `format`, which was `checkpoint_format`; gptqmodel 7.7 and transformers 5.24 write both and read either."""


def of_config(declared: Mapping[str, Any]) -> Gptq:
    """The method that `quantization_config` names. Raises CheckpointError: another kind of GPTQ."""
    bits, chosen = declared.get("bits"), declared.get("dynamic") or {}
    problems: list[CheckpointError] = []
    name, said = format_of(declared, ("checkpoint_format", "format"), "GPTQ", problems)
    kind = said or "gptq"
    if bits != 4:
        problems.append(CheckpointError(f"config.json: GPTQ with bits = {short_repr(bits)}.", "m2ray reads it with 4."))
    if kind not in _ZEROS_ONE_LESS:
        remedy = f"m2ray reads {' and '.join(_ZEROS_ONE_LESS)}; gptqmodel writes both."
        problems.append(CheckpointError(f"config.json: GPTQ with {name} = {short_repr(kind)}.", remedy))
    if not isinstance(chosen, Mapping) or not all(str(name).startswith("-:") for name in chosen):
        remedy = "m2ray reads models of which all modules are packed alike."
        problems.append(CheckpointError(f"config.json: GPTQ with dynamic = {short_repr(chosen)}.", remedy))
    group = group_of(declared, "GPTQ", problems)
    raise_all(problems)
    return Gptq(group, zeros_one_less=_ZEROS_ONE_LESS[kind], in_order=declared.get("desc_act") is False)
