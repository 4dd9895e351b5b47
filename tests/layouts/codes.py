"""Random tensors as they lie on disk. Every code is a value of its layout, so random bytes are weights."""

import torch

_random = torch.Generator().manual_seed(20)


def random_bytes(*shape: int) -> torch.Tensor:
    """uint8."""
    return torch.randint(256, shape, dtype=torch.uint8, generator=_random)


def random_words(*shape: int) -> torch.Tensor:
    """int32, of both signs."""
    return random_bytes(*shape[:-1], 4 * shape[-1]).view(torch.int32)


def random_scales(*shape: int) -> torch.Tensor:
    """float32, about 0.01."""
    return torch.empty(shape).uniform_(0.005, 0.02, generator=_random)


def random_e4m3(*shape: int) -> torch.Tensor:
    """float8_e4m3fn above 0, subnormal ones among them."""
    return torch.randint(1, 127, shape, dtype=torch.uint8, generator=_random).view(torch.float8_e4m3fn)


def random_exponents(*shape: int) -> torch.Tensor:
    """uint8, ue8m0 scales between 2**-12 and 2**-5."""
    return torch.randint(115, 123, shape, dtype=torch.uint8, generator=_random)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    left, right = left.contiguous(), right.contiguous()
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
