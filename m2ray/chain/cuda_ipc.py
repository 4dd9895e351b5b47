"""A boundary from GPU to GPU of one node: the receiver maps a buffer of the sender's and copies it out.

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
from m2ray.model.boundary import Boundary

_PROOF_BYTES = 16


@dataclass(frozen=True)
class InSlot:
    """What travels in place of a boundary: its tensors' names, dtypes and shapes, as they lie one after the other in the sender's slot."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Offer:
    """A sender's slot, for a receiver on the same node.

    Attributes:
        node_id: Ray's, of the sender.
        sender: its actor handle.
        handle: what `reduce_tensor` made of the slot.
        proof: the slot's first bytes, drawn by chance: a mapping that shows them is the right one.
    """

    node_id: str
    sender: Any
    handle: Any
    proof: bytes


class Outbox:
    """The sender's slot, large enough for `num_bytes` of a boundary. It is full from `put` to `give_back`."""

    def __init__(self, turns: Turns, device: torch.device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._turns = turns
        self._stream = torch.cuda.Stream(device)
        self._slot = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._filled_in: int | None = None
        """The epoch of what lies in the slot: what an earlier epoch left there nobody fetches."""

    def offer(self, node_id: str, sender: Any) -> Offer:
        """What a receiver needs to map the slot. Its contents are overwritten."""
        proof = secrets.token_bytes(_PROOF_BYTES)
        self._slot[:_PROOF_BYTES] = torch.frombuffer(bytearray(proof), dtype=torch.uint8).to(self._slot.device)
        torch.cuda.synchronize(self._slot.device)
        return Offer(node_id, sender, reduce_tensor(self._slot), proof)

    def put(self, epoch: int, boundary: Boundary, ready: torch.cuda.Event, timeout_s: float) -> InSlot:
        """Copy a boundary, which is there after `ready`, into the slot, once it is free. Raises as `Turns.wait` does."""
        with self._turns.changed:
            self._turns.wait(epoch, lambda: self._filled_in != self._turns.epoch, timeout_s, "the next stage to fetch hidden states")
            self._filled_in = epoch
        # The widest numbers first: so each tensor begins where its dtype may.
        tensors = dict(sorted(boundary.tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        parcel = InSlot(tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for name, place in views(self._slot, parcel).items():
                place.copy_(tensors[name], non_blocking=True)
                tensors[name].record_stream(self._stream)
        self._stream.synchronize()
        return parcel

    def give_back(self, epoch: int) -> None:
        """The receiver has fetched what was put there in `epoch`."""
        with self._turns.changed:
            if self._filled_in == epoch:
                self._filled_in = None
                self._turns.changed.notify_all()


class Inbox:
    """A mapping of a sender's slot into this process.

    Args:
        device: of the receiver; the slot may be on another one.

    Raises:
        RuntimeError: CUDA cannot map it here, or shows other bytes than the sender's.
    """

    def __init__(self, offer: Offer, device: torch.device) -> None:
        self.sender = offer.sender
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slot = _map(offer.handle, device)
        if self._slot[:_PROOF_BYTES].clone().cpu().numpy().tobytes() != offer.proof:
            raise RuntimeError("the mapped memory is not the sender's")

    def take(self, parcel: InSlot) -> Boundary:
        """The boundary on the receiver's device, in memory of its own: the slot may be filled again."""
        taken = {}
        # Tensors of inference mode, as the stage's warm-up had them: for others its first layer would be compiled again.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for name, place in views(self._slot, parcel).items():
                taken[name] = torch.empty(place.shape, dtype=place.dtype, device=self._device)
                taken[name].copy_(place, non_blocking=True)
        for tensor in taken.values():
            tensor.record_stream(torch.cuda.default_stream(self._device))  # where it is computed with
        self._stream.synchronize()
        return Boundary.of(taken)


def _map(handle: Any, device: torch.device) -> torch.Tensor:
    rebuild, values = handle
    named = inspect.signature(rebuild).bind(*values)
    # The handle names the sender's device by its number there, which means nothing here.
    named.arguments["storage_device"] = device.index
    named.arguments["event_sync_required"] = False
    mapped: torch.Tensor = rebuild(*named.args, **named.kwargs)
    return mapped


def views(slot: torch.Tensor, parcel: InSlot) -> dict[str, torch.Tensor]:
    """The tensors of a parcel where they lie in a slot, uint8."""
    found, begin = {}, 0
    for name, dtype, shape in parcel.tensors:
        stop = begin + torch.Size(shape).numel() * dtype.itemsize
        found[name] = slot[begin:stop].view(dtype).view(shape)
        begin = stop
    return found
