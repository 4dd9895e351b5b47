"""How a boundary travels from one stage to the next: through Ray's object store, or from GPU to GPU of one node (cuda_ipc.py).

A bfloat16 tensor given to Ray as it is gets pickled, eight to ten times slower than a memory copy. As a NumPy array
of its bytes it is copied once into shared memory, and mapped without a copy by a receiver on the same node.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from m2ray.chain.cuda_ipc import Inbox, InSlot, Offer, Outbox
from m2ray.chain.turns import Turns
from m2ray.errors import StageError
from m2ray.model.boundary import Boundary
from m2ray.model.stage_output import StageOutput
from m2ray.option_types import Transport

Parcel = Mapping[str, tuple[torch.dtype, npt.NDArray[np.uint8]]]
"""A boundary's tensors by name: the dtype, and the bytes, uint8 [B, T, ..., last axis * itemsize]."""

Payload = Parcel | InSlot
"""What a stage takes from the one before: a boundary's bytes, or where they lie on its GPU."""


class Outgoing:
    """The way to the next stage."""

    def __init__(self, turns: Turns, device: torch.device, transport: Transport, timeout_s: float) -> None:
        self._turns = turns
        self._device = device
        self._transport = transport
        self._timeout_s = timeout_s
        self._outbox: Outbox | None = None
        self._is_connected = False

    def connect(self, successor: Any, node_id: str, handed_bytes: int, timeout_s: float) -> str:
        """Agree with the next stage how boundaries travel. Returns the name of that way.

        Args:
            node_id: Ray's, of this stage.
            handed_bytes: of a full micro-batch; what is larger goes through the object store.

        Raises:
            StageError: transport = "cuda_ipc", and the next stage is on this node but cannot map this GPU's memory.
        """
        self._is_connected = False
        if self._transport == "object_store" or self._device.type != "cuda":
            return "object_store"
        try:
            if self._outbox is None or self._outbox.num_bytes < handed_bytes:
                self._outbox = Outbox(self._turns, self._device, handed_bytes)
            offer = self._outbox.offer(node_id, ray.get_runtime_context().current_actor)
        except RuntimeError as error:
            refusal = f"{self._device} cannot share memory with other processes: {str(error).splitlines()[0]}"
        else:
            refusal = ray.get(successor.connect.remote(offer), timeout=timeout_s)
        self._is_connected = not refusal
        if refusal:
            self._outbox = None
        if refusal and refusal != _ELSEWHERE and self._transport == "cuda_ipc":
            raise StageError(f'transport = "cuda_ipc": {refusal}.', 'Set transport = "auto" to fall back to the object store.')
        return "object_store" if refusal else "cuda_ipc"

    def payload(self, epoch: int, output: StageOutput) -> Any:
        """What to give to the next stage's `take` for the boundary of `output`. Raises as `Turns.wait` does."""
        boundary = output.boundary
        assert boundary is not None, "the last stage has nobody to hand on to"
        num_bytes = sum(tensor.nbytes for tensor in boundary.tensors.values())
        if self._is_connected and self._outbox is not None and num_bytes <= self._outbox.num_bytes:
            assert output.ready is not None
            return self._outbox.put(epoch, boundary, output.ready, self._timeout_s)
        return ray.put(send(output.on_host()))

    def release(self, epoch: int) -> None:
        """The next stage has fetched what lay in the slot."""
        if self._outbox is not None:
            self._outbox.give_back(epoch)


class Incoming:
    """The way from the stage before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inbox: Inbox | None = None

    def connect(self, offer: Offer, node_id: str) -> str:
        """Map the sender's slot, if it is on this node. Gives why that is impossible, or nothing."""
        self._inbox = None
        if offer.node_id != node_id:
            return _ELSEWHERE
        if self._device.type != "cuda":
            return "the next stage has no GPU"
        try:
            self._inbox = Inbox(offer, self._device)
        except RuntimeError as error:
            return f"{self._device} cannot map the memory of the stage before: {str(error).splitlines()[0]}"
        return ""

    def receive(self, epoch: int, payload: Payload) -> Boundary:
        """The boundary in memory of its own: on the device, or on the host where it is to be fetched from there."""
        if not isinstance(payload, InSlot):
            return receive(payload, pinned=self._device.type == "cuda")
        assert self._inbox is not None, "the slot is offered first"
        boundary = self._inbox.take(payload)
        self._inbox.sender.release.remote(epoch)
        return boundary


_ELSEWHERE = "the next stage is on another node"


def send(boundary: Boundary) -> Parcel:
    """The bytes of a boundary on the host; no copy of what lies in one piece."""
    return {name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy()) for name, tensor in boundary.tensors.items()}


def receive(parcel: Parcel, *, pinned: bool) -> Boundary:
    """The boundary in host memory of its own, `pinned` where a GPU is to fetch it.

    What Ray hands over is a read-only map of shared memory. A layer may work in place, so the bytes are copied once.
    """
    tensors = {}
    for name, (dtype, found) in parcel.items():
        tensors[name] = torch.empty((*found.shape[:-1], found.shape[-1] // dtype.itemsize), dtype=dtype, device="cpu", pin_memory=pinned)
        np.copyto(tensors[name].view(torch.uint8).numpy(), found)
    return Boundary.of(tensors)
