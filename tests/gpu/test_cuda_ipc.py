"""A slot of one process's GPU memory, mapped by another one."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
from ray.exceptions import GetTimeoutError

from m2ray.chain.cuda_ipc import Inbox, Outbox
from m2ray.chain.turns import Superseded, Turns

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE, TIMEOUT_S = (3, 50, 256), 60.0


def hidden(seed: int, device: str) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def receive(pipe: Connection, device: str) -> None:
    """Map what is offered, say so, and say after each parcel whether it and all before it are what their seeds make."""
    inbox = Inbox(pipe.recv(), torch.device(device))
    pipe.send("mapped")
    received = {}
    while (message := pipe.recv()) is not None:
        seed, parcel = message
        received[seed] = inbox.take(parcel, torch.bfloat16)  # the slot is filled again with the next one
        pipe.send(all(torch.equal(each, hidden(seed, device)) for seed, each in received.items()))


@pytest.mark.parametrize("receiver", range(min(2, torch.cuda.device_count())))
def test_hidden_states_arrive_as_they_were_sent(receiver: int) -> None:
    turns, device = Turns(0), torch.device("cuda:0")
    outbox = Outbox(turns, device, 2 * torch.Size(SHAPE).numel())
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs, f"cuda:{receiver}"))
    process.start()
    theirs.close()  # a receiver that ends is noticed
    try:
        ours.send(outbox.offer("here", None))
        assert ours.poll(TIMEOUT_S)
        assert ours.recv() == "mapped"
        for seed in range(5):
            sent = hidden(seed, "cuda:0")
            ready = torch.cuda.Event()
            ready.record()
            ours.send((seed, outbox.put(0, sent, ready, TIMEOUT_S)))
            assert ours.poll(TIMEOUT_S)
            assert ours.recv()
            outbox.give_back(0)
    finally:
        ours.send(None)
        process.join(TIMEOUT_S)
        process.kill()


def test_a_full_slot_waits_until_it_is_fetched_or_its_epoch_is_over() -> None:
    turns = Turns(0)
    outbox = Outbox(turns, torch.device("cuda:0"), 2 * torch.Size(SHAPE).numel())
    ready = torch.cuda.Event()
    ready.record()
    outbox.put(0, hidden(0, "cuda:0"), ready, TIMEOUT_S)
    turns.begin(1)
    with pytest.raises(Superseded):
        outbox.put(0, hidden(0, "cuda:0"), ready, TIMEOUT_S)
    outbox.put(1, hidden(1, "cuda:0"), ready, TIMEOUT_S)
    outbox.give_back(0)  # a late word of the epoch before frees nothing
    with pytest.raises(GetTimeoutError, match="waited"):
        outbox.put(1, hidden(1, "cuda:0"), ready, 0.01)
