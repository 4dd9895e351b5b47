"""The kernel of m2ray.model.hash_kernel in numpy: xxh3's accumulators over pieces of a buffer in host memory."""

from typing import Any

import numpy as np
import torch

from m2ray.model.gpu_hashes import WORDS, Words

_KEYS = np.lib.stride_tricks.sliding_window_view(WORDS[:23], 8)
_HALF = np.uint64(32)


class HostHashes:
    """Launched as a kernel is."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *given, **_: self.run(grid[0], *given)

    def run(self, programs: int, table: torch.Tensor, data: torch.Tensor, _: torch.Tensor, found: torch.Tensor, first: int) -> None:
        for number in range(first, first + programs):
            at, num_bytes = table[number].tolist()
            found[number] = torch.from_numpy(accumulated(data[at : at + num_bytes].numpy().view(np.uint64)).view(np.int64))


def accumulated(words: Words) -> Words:
    """What a piece's words come to."""
    accumulators = WORDS[32:].copy()
    stripes = words[: (len(words) - 1) // 8 * 8].reshape(-1, 8)
    for start in range(0, len(stripes), 16):
        block = stripes[start : start + 16]
        accumulators += _taken(block, _KEYS[: len(block)]).sum(axis=0, dtype=np.uint64)
        if len(block) == 16 and start + 16 <= (len(words) - 1) // 128 * 16:
            accumulators = (accumulators ^ (accumulators >> np.uint64(47)) ^ WORDS[16:24]) * np.uint64(0x9E3779B1)
    return accumulators + _taken(words[-8:], WORDS[24:32])


def _taken(stripes: Words, keys: Words) -> Words:
    keyed = stripes ^ keys
    neighbours = stripes.reshape(*stripes.shape[:-1], 4, 2)[..., ::-1].reshape(stripes.shape)
    return (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> _HALF) + neighbours
