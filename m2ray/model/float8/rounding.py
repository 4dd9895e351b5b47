"""Activations as FP8, with a scale for each 128 values of a row, as models that were published so are served.

`scale = max(|x|) / 448`, 448 being the largest number of float8_e4m3fn, and `x / scale` rounded to it: transformers' finegrained_fp8, DeepGEMM
and vLLM round alike, but for what they do with values of next to nothing. torch.compile makes one kernel of it, together with what comes before.
"""

import torch

BLOCK = 128
"""Values of a row that share a scale, and rows and columns of a weight that do."""

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max

_LEAST = 1e-10
"""Of a block's largest value: zeros have a scale too."""


def round_rows(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, W] of any float dtype as FP8 [N, W], and the scales of their blocks, float32 [N, W / 128]. W is a multiple of 128.

    A block that holds what is not finite gives NaN.
    """
    blocks = rows_NW.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True).float().clamp(min=_LEAST) / _LARGEST
    return (blocks / scales).to(FP8).flatten(-2), scales.squeeze(-1)  # by float32 they are divided in float32, without a copy in it
