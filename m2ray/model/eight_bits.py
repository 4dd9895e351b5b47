"""Rows in 8 bits: the channels of a row in blocks, each with a scale of its own. What is lost by it is counted, part by part."""

import torch
from torch.nn.functional import pad

from m2ray.batches import PartSpec
from m2ray.sites import BLOCK_CHANNELS

_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""What the largest value of a block becomes, by what is stored."""

ENCODED_BYTES = 64 << 20
"""Of rows, in float32, that are encoded at a time: the memory that it takes beside them is a few times that."""

Losses = tuple[tuple[str, int | None, float, float], ...]
"""Of each part site and layer, and two sums over its values: of what was lost, squared, and of what there was, squared."""


def is_encoded(part: PartSpec) -> bool:
    """Whether a part's rows are in 8 bits."""
    return part.columns[0].dtype in _LARGEST


class Encoder:
    """Encodes the rows of a stage's parts on their device. One call at a time; any thread may ask for the losses."""

    def __init__(self) -> None:
        self._losses: dict[PartSpec, torch.Tensor] = {}

    def encode(self, part: PartSpec, rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [N, W] as the part's columns: 8 bits a channel [N, W], and the scales [N, blocks], float32.

        A block with a value that is not finite has a scale that is none either.
        """
        values = torch.empty(rows_NW.shape, dtype=getattr(torch, part.columns[0].dtype), device=rows_NW.device)
        scales = torch.empty((len(rows_NW), part.columns[1].width), dtype=torch.float32, device=rows_NW.device)
        losses = self._losses.setdefault(part, torch.zeros(2, dtype=torch.float64, device=rows_NW.device))
        at_once = max(1, ENCODED_BYTES // (4 * rows_NW.shape[1]))
        for start in range(0, len(rows_NW), at_once):
            piece = slice(start, start + at_once)
            lost = _encode(rows_NW[piece], _LARGEST[part.columns[0].dtype], values[piece], scales[piece])
            losses += lost
        return values, scales

    def losses(self) -> Losses:
        """Those of all parts so far."""
        return tuple((part.site, part.layer, *lost.tolist()) for part, lost in list(self._losses.items()))


def _encode(rows_NW: torch.Tensor, largest: float, values_NW: torch.Tensor, scales_NK: torch.Tensor) -> torch.Tensor:
    """Fill `values_NW` and `scales_NK`. Returns the squares of what was lost and of what there was, summed: float64 [2]."""
    width, num_blocks = rows_NW.shape[1], scales_NK.shape[1]
    blocks_NKC = pad(rows_NW.float(), (0, num_blocks * BLOCK_CHANNELS - width)).unflatten(1, (num_blocks, BLOCK_CHANNELS))
    # By a tensor on the device: where the divisor is a number, CUDA multiplies by its inverse, which rounds otherwise than the CPU's division.
    # Never so small that the division by it is none by a number.
    most = torch.full((), largest, dtype=torch.float32, device=rows_NW.device)
    torch.clamp(blocks_NKC.abs().amax(2) / most, min=torch.finfo(torch.float32).tiny, out=scales_NK)
    scaled_NKC = blocks_NKC / scales_NK[:, :, None]
    stored_NKC = (scaled_NKC if values_NW.is_floating_point() else scaled_NKC.round_()).to(values_NW.dtype)
    values_NW.copy_(stored_NKC.flatten(1)[:, :width])
    lost_NKC = blocks_NKC - stored_NKC.float() * scales_NK[:, :, None]
    return torch.stack([lost_NKC.square().sum(), blocks_NKC.square().sum()]).double()
