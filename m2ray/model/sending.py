"""Small values from the host to a GPU, beside what it computes and what else is copied there."""

from functools import cache

import torch


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on a GPU, for what comes next on its current stream; the host goes on.

    They go as soon as they are sent. On the current stream they would wait for all that is computed before, and the GPU then for them, behind
    whatever is being copied to it.
    """
    sending, computing = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(sending):
        sent = values.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(sending)
    sent.record_stream(computing)
    return sent


@cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
