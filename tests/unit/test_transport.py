"""Hidden states on their way between stages, as a receiver gets them."""

from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from m2ray.chain.cuda_ipc import Inbox, InSlot, views
from m2ray.chain.transport import Incoming, send
from m2ray.model.boundary import Boundary
from tests.reference import same_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_received_hidden_states_have_memory_of_their_own(dtype: torch.dtype) -> None:
    """The object store hands over a read-only map of memory that it fills again later, and a layer may work in place."""
    generator = torch.Generator().manual_seed(1)
    keys_BTAD = torch.randn(2, 5, 3, 4, generator=generator).to(dtype).transpose(1, 2)  # not in one piece
    indices_BTK = torch.randint(0, 9, (2, 3, 7), generator=generator, dtype=torch.int32)
    sent = Boundary(torch.randn(2, 3, 4, generator=generator).to(dtype), {"keys": keys_BTAD, "indices": indices_BTK})
    stored = {name: (dtype, found.copy()) for name, (dtype, found) in send(sent).items()}
    mapped = {name: (dtype, found.view()) for name, (dtype, found) in stored.items()}
    for _, found in mapped.values():
        found.flags.writeable = False
    received = Incoming(torch.device("cpu")).receive(0, mapped)
    for name, tensor in received.tensors.items():
        assert not np.shares_memory(tensor.view(torch.uint8).numpy(), stored[name][1]), "nor is it written to"
        stored[name][1][:] = 0
        assert same_bits(tensor, sent.tensors[name].contiguous()), name
    assert received.tensors.keys() == sent.tensors.keys()


def test_a_slot_holds_tensors_of_any_dtype_one_after_the_other() -> None:
    """Three bfloat16 are six bytes: an int32 that came after them would begin where none may."""
    slot = torch.zeros(64, dtype=torch.uint8)
    parcel = InSlot((("indices", torch.int32, (1, 1, 2)), ("hidden_BTH", torch.bfloat16, (1, 1, 3))))
    for name, place in views(slot, parcel).items():
        place.fill_(7 if name == "indices" else 1.5)
    found = views(slot, parcel)
    assert found["indices"].tolist() == [[[7, 7]]]
    assert found["hidden_BTH"].tolist() == [[[1.5, 1.5, 1.5]]]
    assert not slot[14:].any()


def test_what_is_fetched_from_another_gpu_is_made_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what a stage warms up with is: for other tensors its first layer was compiled again, two seconds a stage, one stage after the other."""
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    inbox = Inbox.__new__(Inbox)
    inbox._device, inbox._stream = torch.device("cpu"), Mock()
    inbox._slot = torch.arange(24, dtype=torch.uint8)
    taken = inbox.take(InSlot((("hidden_BTH", torch.bfloat16, (1, 3, 4)),))).hidden_BTH
    assert taken.is_inference()
    assert torch.equal(taken.flatten().view(torch.uint8), inbox._slot)
