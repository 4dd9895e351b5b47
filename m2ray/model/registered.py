"""Host memory that is registered with CUDA, so that a GPU copies to and from it directly: memory of m2ray's own, which torch has not pinned."""

from contextlib import suppress

import torch

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all GPUs of the process."""


def register(address: int, num_bytes: int, device: torch.device) -> int:
    """Register memory, and give CUDA's error: 0 where it is registered.

    A call that fails leaves its error behind, and torch tells it of the next kernel that this thread launches, whatever that is: so one is launched here.
    """
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE))
        if error:
            with suppress(RuntimeError):
                torch.ones(1, device=device)
    return error


def unregister(address: int) -> None:
    """Before the memory is given back: what is allocated at its place later could not be registered again."""
    torch.cuda.cudart().cudaHostUnregister(address)
