"""Whole numbers of four or eight bits in int32 words, as AWQ, GPTQ and compressed-tensors pack them, and what a group's scale makes of them."""

import torch


def unpack_words(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The unsigned numbers of each int32 word, lowest bits first, uint8 [..., words * 32 / bits].

    Args:
        words: int32 [..., words], contiguous.
        bits: 4 or 8 a number.
    """
    data = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)  # one row's columns are contiguous at any stride
    return data if bits == 8 else torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def scaled(numbers: torch.Tensor, zeros: torch.Tensor | int, scale: torch.Tensor) -> torch.Tensor:
    """(number - zero) * scale, in the dtype of `scale`, which the libraries multiply in: it is rounded once there.

    Args:
        numbers: uint8; `zeros` and `scale` have or broadcast to its shape.
        zeros: uint8, or one number.
    """
    zeros = zeros if isinstance(zeros, int) else zeros.to(torch.int16)
    return (numbers.to(torch.int16) - zeros).to(scale.dtype).mul_(scale)
