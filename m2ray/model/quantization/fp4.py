"""FP4 e2m1: 16 values of four bits, two of them a byte, the first in the low bits. Every FP4 layout has these under its own scales."""

from functools import cache

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7. Bit 3 is the sign (OCP Microscaling Formats 1.0, section 5.3.3)."""


def unpack_e2m1(packed: torch.Tensor, *, negative_zero: bool = True) -> torch.Tensor:
    """The values of FP4 codes, bfloat16 [..., 2 * bytes], which holds each exactly.

    Args:
        packed: two codes a byte, [..., bytes], contiguous, in any dtype of one byte.
        negative_zero: whether code 8 is -0.0, as the format has it; some libraries read it as 0.0.
    """
    codes = packed.view(torch.uint8)
    pairs = torch.index_select(_pairs(codes.device, negative_zero), 0, codes.reshape(-1).int())
    return pairs.reshape(codes.shape).view(torch.bfloat16)


@cache
def _pairs(device: torch.device, negative_zero: bool) -> torch.Tensor:  # noqa: FBT001 - for the cache
    """int32 [256]: a byte's two values as the bits of two bfloat16, so that one look-up gives both."""
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.bfloat16)
    if not negative_zero:
        values[8] = 0.0
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return both.view(torch.int32).reshape(-1).to(device)
