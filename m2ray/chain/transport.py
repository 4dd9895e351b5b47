"""How hidden states travel from one stage to the next: as raw bits through Ray's object store.

A bfloat16 tensor given to Ray as it is gets pickled, eight to ten times slower than a memory copy. As a NumPy array
of its bits it is copied once into shared memory, and mapped without a copy by the receiver on the same node.
"""

import numpy as np
import numpy.typing as npt
import torch

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}

Payload = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def send(hidden_BTH: torch.Tensor) -> Payload:
    """The bits of hidden states on the host as an unsigned-integer array [B, T, H]; no copy."""
    payload: Payload = hidden_BTH.contiguous().view(_BITS[hidden_BTH.dtype]).numpy()
    return payload


def receive(payload: Payload, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """The hidden states [B, T, H] in `dtype`, in host memory of their own, `pinned` where a GPU is to fetch them.

    What Ray hands over is a read-only map of shared memory. A layer may work in place, so the bits are copied once.
    """
    hidden_BTH = torch.empty(payload.shape, dtype=dtype, device="cpu", pin_memory=pinned)
    np.copyto(hidden_BTH.view(_BITS[dtype]).numpy(), payload)
    return hidden_BTH


def hidden_bytes(padded_tokens: int, hidden_size: int, itemsize_bytes: int) -> int:
    """Bytes of one micro-batch's hidden states on their way."""
    return padded_tokens * hidden_size * itemsize_bytes
