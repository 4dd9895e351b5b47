"""A slot of one process's GPU memory, mapped by another one."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
from ray.exceptions import GetTimeoutError

from m2ray.chain.cuda_ipc import Inbox, Outbox
from m2ray.chain.turns import Superseded, Turns
from m2ray.model.boundary import Boundary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE, TIMEOUT_S = (3, 5, 85), 60.0
NUM_BYTES = 2 * 3 * 5 * 85 + 4 * 3 * 5 * 7


def handed(seed: int, device: str) -> Boundary:
    """Hidden states, an odd number of them, and indices."""
    generator = torch.Generator().manual_seed(seed)
    indices_BTK = torch.randint(0, 99, (*SHAPE[:2], 7), generator=generator, dtype=torch.int32)
    return Boundary(torch.randn(SHAPE, generator=generator).bfloat16(), {"indices": indices_BTK}).map(lambda tensor: tensor.to(device))


def equal(one: Boundary, other: Boundary) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def receive(pipe: Connection, device: str) -> None:
    """Map what is offered, say so, and say after each parcel whether it and all before it are what their seeds make."""
    inbox = Inbox(pipe.recv(), torch.device(device))
    pipe.send("mapped")
    received = {}
    while (message := pipe.recv()) is not None:
        seed, parcel = message
        received[seed] = inbox.take(parcel)  # the slot is filled again with the next one
        made_for_inference = all(tensor.is_inference() for tensor in received[seed].tensors.values())  # others have layers compiled again
        pipe.send(made_for_inference and all(equal(each, handed(seed, device)) for seed, each in received.items()))


@pytest.mark.parametrize("receiver", range(min(2, torch.cuda.device_count())))
def test_hidden_states_arrive_as_they_were_sent(receiver: int) -> None:
    turns, device = Turns(0), torch.device("cuda:0")
    outbox = Outbox(turns, device, NUM_BYTES)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs, f"cuda:{receiver}"))
    process.start()
    theirs.close()  # a receiver that ends is noticed
    try:
        ours.send(outbox.offer("here", None))
        assert ours.poll(TIMEOUT_S)
        assert ours.recv() == "mapped"
        for seed in range(5):
            sent = handed(seed, "cuda:0")
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
    outbox = Outbox(turns, torch.device("cuda:0"), NUM_BYTES)
    ready = torch.cuda.Event()
    ready.record()
    outbox.put(0, handed(0, "cuda:0"), ready, TIMEOUT_S)
    turns.begin(1)
    with pytest.raises(Superseded):
        outbox.put(0, handed(0, "cuda:0"), ready, TIMEOUT_S)
    outbox.put(1, handed(1, "cuda:0"), ready, TIMEOUT_S)
    outbox.give_back(0)  # a late word of the epoch before frees nothing
    with pytest.raises(GetTimeoutError, match="waited"):
        outbox.put(1, handed(1, "cuda:0"), ready, 0.01)
