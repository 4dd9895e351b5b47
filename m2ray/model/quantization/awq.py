"""AWQ (version "gemm"), 4 bits: int32 words of eight numbers along the output features, in an order of their own, with zero points.

As autoawq 0.2.9 computes it (`dequantize_gemm`).
"""

import torch

from m2ray.model.quantization.int4 import scaled, unpack_words

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight output features stands."""


def unpack(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight, a view, [out_features, in_features] in the dtype of `scales`, float16.

    Args:
        qweight: int32 [in_features, out_features / 8].
        qzeros: int32 [groups, out_features / 8].
        scales: float16 [groups, out_features].
    """
    grouped = _in_order(qweight).unflatten(0, (scales.shape[0], -1))
    return scaled(grouped, _in_order(qzeros).unsqueeze(1), scales.unsqueeze(1)).flatten(0, 1).t()


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, features]."""
    order = torch.tensor(ORDER, device=words.device)
    return unpack_words(words).unflatten(-1, (-1, len(ORDER))).index_select(-1, order).flatten(-2)
