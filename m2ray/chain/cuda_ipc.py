"""Hidden states from GPU to GPU of one node: the receiver maps two buffers of the sender's and copies them out.

torch shares GPU memory between processes through CUDA's interprocess handles. CUDA opens a handle of a GPU that the process does not
see, and enables peer access for it ("CUDA Runtime API", cudaIpcOpenMemHandle); so stages keep the one GPU that Ray shows them, and
the mapping is made from the receiver's own device. No event is shared: both sides wait for their copies before they tell each other.
"""

import inspect
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from m2ray.chain.turns import Turns

NUM_SLOTS = 2
"""One is copied out while the next micro-batch is put into the other."""

_PROOF_BYTES = 16


@dataclass(frozen=True)
class InSlot:
    """What travels in place of hidden states: they lie in a slot of the sender's."""

    slot: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Offer:
    """A sender's slots, for a receiver on the same node.

    Attributes:
        node_id: Ray's, of the sender.
        sender: its actor handle.
        handles: of each slot, what `reduce_tensor` made of it.
        proofs: the first bytes of each slot, drawn by chance: a mapping that shows them is the right one.
    """

    node_id: str
    sender: Any
    handles: tuple[Any, ...]
    proofs: tuple[bytes, ...]


class Outbox:
    """The sender's slots, each large enough for `num_bytes` of hidden states."""

    def __init__(self, turns: Turns, device: torch.device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._turns = turns
        self._stream = torch.cuda.Stream(device)
        self._slots = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self._taken: dict[int, int] = {}
        """The epoch in which a slot was taken last, until it is given back."""

    def offer(self, node_id: str, sender: Any) -> Offer:
        """What a receiver needs to map the slots. Their contents are overwritten."""
        proofs = tuple(secrets.token_bytes(_PROOF_BYTES) for _ in self._slots)
        for slot, proof in zip(self._slots, proofs, strict=True):
            slot[:_PROOF_BYTES] = torch.frombuffer(bytearray(proof), dtype=torch.uint8).to(slot.device)
        torch.cuda.synchronize(self._slots[0].device)
        return Offer(node_id, sender, tuple(reduce_tensor(slot) for slot in self._slots), proofs)

    def put(self, epoch: int, hidden_BTH: torch.Tensor, ready: torch.cuda.Event, timeout_s: float) -> InSlot:
        """Copy hidden states, which are there after `ready`, into a free slot, once there is one. Raises as `Turns.wait` does."""
        with self._turns.changed:
            self._turns.wait(epoch, self._free, timeout_s, "the next stage to take hidden states over")
            slot = self._free()[0]
            self._taken[slot] = epoch
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            _in(self._slots[slot], hidden_BTH.shape, hidden_BTH.dtype).copy_(hidden_BTH, non_blocking=True)
        hidden_BTH.record_stream(self._stream)
        self._stream.synchronize()
        return InSlot(slot, tuple(hidden_BTH.shape))

    def give_back(self, epoch: int, slot: int) -> None:
        """The receiver has copied the slot out."""
        with self._turns.changed:
            if self._taken.get(slot) == epoch:
                del self._taken[slot]
                self._turns.changed.notify_all()

    def _free(self) -> list[int]:
        """Slots that nobody has to copy out in this epoch: those of earlier ones are given up."""
        return [slot for slot in range(NUM_SLOTS) if self._taken.get(slot) != self._turns.epoch]


class Inbox:
    """A mapping of a sender's slots into this process.

    Args:
        device: of the receiver; the slots may be on another one.

    Raises:
        RuntimeError: CUDA cannot map them here, or shows other bytes than the sender's.
    """

    def __init__(self, offer: Offer, device: torch.device) -> None:
        self.sender = offer.sender
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [_map(handle, device) for handle in offer.handles]
        for slot, proof in zip(self._slots, offer.proofs, strict=True):
            if bytes(slot[:_PROOF_BYTES].clone().cpu().numpy()) != proof:
                raise RuntimeError("the mapped memory is not the sender's")

    def take(self, parcel: InSlot, dtype: torch.dtype) -> torch.Tensor:
        """The hidden states [B, T, H] on the receiver's device, in memory of their own: the slot is free when this returns."""
        with torch.cuda.stream(self._stream):
            hidden_BTH = torch.empty(parcel.shape, dtype=dtype, device=self._device)
            hidden_BTH.copy_(_in(self._slots[parcel.slot], parcel.shape, dtype), non_blocking=True)
        hidden_BTH.record_stream(torch.cuda.default_stream(self._device))  # where it is computed with
        self._stream.synchronize()
        return hidden_BTH


def _map(handle: Any, device: torch.device) -> torch.Tensor:
    rebuild, values = handle
    named = inspect.signature(rebuild).bind(*values)
    # The handle names the sender's device by its number there, which means nothing here.
    named.arguments["storage_device"] = device.index
    named.arguments["event_sync_required"] = False
    mapped: torch.Tensor = rebuild(*named.args, **named.kwargs)
    return mapped


def _in(slot: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The beginning of a slot as a tensor of `shape`."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return slot[:num_bytes].view(dtype).view(shape)
