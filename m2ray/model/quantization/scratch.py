"""Tensors for what is made on the way on a CPU, in memory that a thread has already."""

from math import prod

import torch

from m2ray.storage.scratch import scratch


def scratch_tensor(purpose: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Contiguous, with anything in it, and this thread's until it asks for the same purpose again, in whatever dtype."""
    num_bytes = prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)  # out of no memory torch makes no tensor
    return torch.frombuffer(scratch(purpose, num_bytes), dtype=dtype).view(shape)
