"""Each thread's memory for what is made on the way on a CPU: to be given new memory takes longer than what is then computed in it."""

import threading
from math import prod

import torch


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_KEPT = _OfThread()


def kept(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Contiguous memory with anything in it, the same each time that this thread asks for it by this name and dtype."""
    count, by_name = prod(shape), _KEPT.by_name
    if (name, dtype) not in by_name or len(by_name[name, dtype]) < count:
        with torch.inference_mode(mode=False):  # what is made in that mode may be written in no other
            by_name[name, dtype] = torch.empty(count, dtype=dtype)
    return by_name[name, dtype][:count].view(shape)
