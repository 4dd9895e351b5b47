"""Tensors in memory of huge pages on a CPU: what is made on the way, in memory that a thread has already, and what stays."""

from math import prod

import torch

from m2ray.storage.scratch import aligned, scratch


def fresh_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Contiguous, with anything in it. torch asks for no huge pages, and to be given 4 KiB after 4 KiB takes longer than to unpack into them."""
    num_bytes = prod(shape) * dtype.itemsize
    return torch.frombuffer(aligned(num_bytes), dtype=dtype).view(shape) if num_bytes else torch.empty(shape, dtype=dtype)


def scratch_tensor(purpose: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Contiguous, with anything in it, and this thread's until it asks for the same purpose again, in whatever dtype."""
    num_bytes = prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)  # out of no memory torch makes no tensor
    return torch.frombuffer(scratch(purpose, num_bytes), dtype=dtype).view(shape)
