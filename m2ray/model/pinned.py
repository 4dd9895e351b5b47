"""Pinned host memory for captured rows, in runs of one size, so that torch finds each again among those that it keeps."""

from math import prod

import torch

_ALIGNMENT = 64


class PinnedRuns:
    """One micro-batch's rows on the host, a part after the other. Each part's rows lie in one piece; those of a small micro-batch share runs.

    torch keeps pinned memory by powers of two of its size. What it does not have takes the system long, and the computation waits for it: with
    16 layers a stage, all captured, the last and small micro-batches of shards, which found none of their sizes, took half of the time.
    """

    def __init__(self, run_bytes: int) -> None:
        """`run_bytes`: of a run, if the rows fill one: those of one part of a full micro-batch. 0: each part's rows are a run."""
        self._run_bytes = run_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, parts_left: int) -> torch.Tensor:
        """Memory for one part's rows. `parts_left`: how many of like size are still to come, this one among them."""
        exact_bytes = prod(shape) * dtype.itemsize
        num_bytes = -(-exact_bytes // _ALIGNMENT) * _ALIGNMENT
        if len(self._left) < num_bytes:
            self._left = _pinned(max(num_bytes, min(self._run_bytes, parts_left * num_bytes)))
        taken, self._left = self._left[:exact_bytes], self._left[num_bytes:]
        return taken.view(dtype).view(shape)


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
