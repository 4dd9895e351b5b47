"""Each thread's memory for what is made on the way on a CPU: to be given new memory takes longer than what is then computed in it."""

import threading
from math import prod

import torch

_KEPT = threading.local()


def kept(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Contiguous memory with anything in it, the same each time that this thread asks for it by this name and dtype."""
    count, by_name = prod(shape), _KEPT.__dict__
    if (name, dtype) not in by_name or len(by_name[name, dtype]) < count:
        with torch.inference_mode(mode=False):  # what is made in that mode may be written in no other
            by_name[name, dtype] = torch.empty(count, dtype=dtype)
    memory: torch.Tensor = by_name[name, dtype]
    return memory[:count].view(shape)
