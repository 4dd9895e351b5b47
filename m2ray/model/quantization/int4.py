"""Whole numbers of four or eight bits in int32 words, as AWQ, GPTQ and compressed-tensors pack them."""

import torch

from m2ray.model.quantization.nibbles import Codes, as_bytes, look_up


def unpack_words(words: torch.Tensor, dtype: torch.dtype, bits: int = 4, less: int = 0) -> torch.Tensor:
    """The unsigned numbers of each int32 word, lowest bits first, [..., words * 32 / bits], as floats, which hold each exactly.

    Args:
        words: int32 [..., words], contiguous along its last axis.
        dtype: bfloat16, float16 or float32.
        bits: 4 or 8 a number.
        less: is taken from each: 0 or half of their range.
    """
    if bits == 4:
        return look_up(words, Codes.LESS_8 if less else Codes.UNSIGNED, dtype)
    return as_bytes(words).to(dtype).sub_(less)
