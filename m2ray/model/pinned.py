"""Pinned host memory for captured rows, in runs of one size, so that torch finds each again among those that it keeps."""

from math import prod

import torch

_ALIGNMENT = 64


class PinnedRuns:
    """Rows on the host, a part after the other. Each part's rows lie in one piece; those of small micro-batches share runs. One thread calls.

    torch keeps pinned memory by powers of two of its size. What it does not have takes the system long, and the computation waits for it: with
    16 layers a stage, all captured, the last and small micro-batches of shards, which found none of their sizes, took half of the time. So
    every run is as long as a full micro-batch's rows, and what one micro-batch leaves of it the next one takes.
    """

    def __init__(self, run_rows: int = 0) -> None:
        """`run_rows`: of a run, the tokens of a full micro-batch. 0: each part's rows are a run."""
        self._run_rows = run_rows
        self._left: dict[int, torch.Tensor] = {}
        """By the bytes of a row, what is left of the last run."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for one part's rows: the run that it lies in stays as long as any of them does."""
        row_bytes = prod(shape[1:]) * dtype.itemsize
        exact_bytes = shape[0] * row_bytes
        num_bytes = -(-exact_bytes // _ALIGNMENT) * _ALIGNMENT
        left = self._left.pop(row_bytes, None)
        if left is None or len(left) < num_bytes:
            left = _pinned(max(num_bytes, self._run_rows * row_bytes))
        if len(left) > num_bytes:  # what is used up is nobody's to keep
            self._left[row_bytes] = left[num_bytes:]
        return left[:exact_bytes].view(dtype).view(shape)


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
