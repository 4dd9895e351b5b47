"""Hidden states on their way between stages, as a receiver gets them."""

import numpy as np
import pytest
import torch

from m2ray.chain.transport import Incoming, send
from tests.reference import same_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_received_hidden_states_have_memory_of_their_own(dtype: torch.dtype) -> None:
    """The object store hands over a read-only map of memory that it fills again later, and a layer may work in place."""
    sent_BTH = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    stored = send(sent_BTH).copy()
    mapped = stored.view()
    mapped.flags.writeable = False
    received_BTH = Incoming(torch.device("cpu"), dtype).receive(0, mapped)
    assert not np.shares_memory(received_BTH.view(torch.uint8).numpy(), stored), "nor is it written to"
    stored[:] = 0
    assert same_bits(received_BTH, sent_BTH)
