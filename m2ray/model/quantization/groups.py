"""One pass over memory on a CPU: bfloat16 or float16 values, less their groups' zero points, times their groups' float32 scales, rounded once.

torch multiplies bfloat16 by one number, or by as many bfloat16 ones. By a float32 number a group it does so only where a batch is normalised by
what is known of it, value * scale + offset: with mean 0 and variance 1 nothing else is left of that. Held here against plain torch before it is used.
"""

from functools import cache

import torch

_SIZES = (3, 16, 24, 32, 128)
"""Of groups, which torch computes in whole vectors or in part."""

_VECTOR = 32
"""Values of 16 bits in the longest vector that torch computes with: groups of fewer it multiplies by their scales one by one."""


class GroupScales:
    """The scales of consecutive groups of a matrix's values, each of `size` columns, made ready once for all the pieces that they are taken in."""

    def __init__(self, scales: torch.Tensor, size: int, zeros: torch.Tensor | None = None) -> None:
        """With zero points values times scales have to be exact in float32, and scales positive; without a product of the scales' own dtype's do.

        Args:
            scales: [groups], contiguous; float32, or of the values' dtype.
            zeros: float32 [groups], contiguous.
        """
        self._size = size
        self._short = scales.unsqueeze(-1) if scales.dtype != torch.float32 and zeros is None and size >= _VECTOR else None
        if self._short is not None:
            return
        self._scales = scales.float()
        zero, self._variances, self._offsets = _of_nothing(1 << len(scales).bit_length())
        self._means = zero[: len(scales)].copysign(self._scales) if zeros is None else zeros  # offset - mean * scale is -0.0 then
        self._nothing = torch.empty(0)

    def write(self, values: torch.Tensor, first: int, into: torch.Tensor) -> None:
        """Write (value - zero point) * scale, computed in float32.

        Args:
            values: contiguous, whole groups from the one numbered `first` on.
            into: as values, or values themselves.
        """
        values, into = values.view(-1, self._size), into.view(-1, self._size)
        count = len(values)
        of = slice(first, first + count)
        if self._short is not None:
            torch.mul(values, self._short[of], out=into)
            return
        statistics = self._scales[of], self._offsets[:count], self._means[of], self._variances[:count]
        out = (into.unsqueeze(0), self._nothing, self._nothing)
        torch.native_batch_norm(values.unsqueeze(0), *statistics, False, 0.0, 0.0, out=out)


def in_bfloat16(scales: torch.Tensor) -> torch.Tensor:
    """float32 scales as bfloat16, if that is what they are: torch's own product is faster."""
    short = scales.to(torch.bfloat16)
    return short if torch.equal(short.float(), scales) else scales


@cache
def is_exact() -> bool:
    """Whether `GroupScales` gives the bits of plain torch on this CPU: for numbers of each size and sign, ties, zeros and infinities."""
    generator = torch.Generator().manual_seed(1)
    for size in _SIZES:
        for dtype in (torch.bfloat16, torch.float16):
            bits = torch.randint(-(2**15), 2**15, (64, size), generator=generator, dtype=torch.int16)
            values, scales = bits.view(dtype), torch.randn(64, generator=generator) * 2.0 ** torch.arange(-40, 24)
            values = torch.where(values.isnan() | (values.float().abs() < 2.0**-100), -0.0, values)
            values[:, 0] = 0.0
            codes, positive = bits.remainder(16).to(dtype), scales.abs().clamp(2.0**-20, 2.0**10).to(dtype).float()
            if not _is_as(values, scales, None) or not _is_as(codes, positive, scales.sign() + 7):
                return False
    return True


def _is_as(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> bool:
    into = torch.empty_like(values)
    GroupScales(scales, values.shape[1], zeros).write(values, 0, into)
    less = values.float() if zeros is None else values.float() - zeros[:, None]
    expected = (less * scales[:, None]).to(values.dtype)
    return torch.equal(into.view(torch.int16), expected.view(torch.int16))


@cache
def _of_nothing(count: int) -> tuple[torch.Tensor, ...]:
    """Means, variances and offsets that change nothing. An offset of 0.0 would make -0.0 into 0.0."""
    return torch.zeros(count), torch.ones(count), torch.full((count,), -0.0)
