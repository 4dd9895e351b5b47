"""One pass over memory on a CPU: bfloat16 or float16 values, less their groups' zero points, times their groups' float32 scales, rounded once.

torch multiplies bfloat16 by one number, or by as many bfloat16 ones. By a float32 number a group it does so only where a batch is normalised by
what is known of it, value * scale + offset: with mean 0 and variance 1 nothing else is left of that. Held here against plain torch before it is used.
"""

from functools import cache

import torch

_SIZES = (3, 16, 24, 32, 128)
"""Of groups, which torch computes in whole vectors or in part."""


def scale_groups(values: torch.Tensor, scales: torch.Tensor, into: torch.Tensor, zeros: torch.Tensor | None = None) -> None:
    """Write (value - zero point) * scale, computed in float32.

    With zero points values times scales have to be exact in float32, and scales positive.

    Args:
        values: bfloat16 or float16 [groups, size], contiguous.
        scales, zeros: float32 [groups], contiguous.
        into: as values, or values themselves.
    """
    zero, variances, offsets = (numbers[: len(values)] for numbers in _of_nothing(1 << len(values).bit_length()))
    means = zero.copysign(scales) if zeros is None else zeros  # offset - mean * scale is -0.0 then
    nothing = scales.new_empty(0)
    torch.native_batch_norm(
        values.unsqueeze(0), scales, offsets, means, variances, False, 0.0, 0.0, out=(into.unsqueeze(0), nothing, nothing)
    )


@cache
def is_exact() -> bool:
    """Whether `scale_groups` gives the bits of plain torch on this CPU: for numbers of each size and sign, ties, zeros and infinities."""
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
    scale_groups(values, scales, into, zeros)
    less = values.float() if zeros is None else values.float() - zeros[:, None]
    expected = (less * scales[:, None]).to(values.dtype)
    return torch.equal(into.view(torch.int16), expected.view(torch.int16))


@cache
def _of_nothing(count: int) -> tuple[torch.Tensor, ...]:
    """Means, variances and offsets that change nothing. An offset of 0.0 would make -0.0 into 0.0."""
    return torch.zeros(count), torch.ones(count), torch.full((count,), -0.0)
