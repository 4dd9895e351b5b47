"""What arrives at a stage from the one before, or at a run of its layers: checked, and copied to its GPU beside the computation."""

from typing import Any

import torch

from m2ray.batches import MicroBatch
from m2ray.model.boundary import Boundary, shapes_at


class Arriving:
    """Boundaries on their way to one device."""

    def __init__(self, config: Any, compute_dtype: torch.dtype, device: torch.device) -> None:
        """`config`: the model's."""
        self._config = config
        self._compute_dtype = compute_dtype
        self._device = device
        self._copy_in = torch.cuda.Stream(device) if device.type == "cuda" else None

    def check(self, incoming: Boundary, micro_batch: MicroBatch, layer: int) -> None:
        """What comes to `layer` has to be what that computes with."""
        num_sequences, length = micro_batch.token_ids_BT.shape
        wanted = shapes_at(self._config, layer, (num_sequences, length), self._compute_dtype)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in incoming.tensors.items()}
        assert found == wanted, f"hidden states and what goes with them came as {found}, not as {wanted}"
        # What the host sends is copied in that mode, and so was what the warm-up ran; for other tensors the first layer is compiled again.
        here = [tensor for tensor in incoming.tensors.values() if tensor.is_cuda]
        assert all(tensor.is_inference() for tensor in here), "what comes in on a GPU has to be made in inference mode"

    def on_device(self, incoming: Boundary) -> Boundary:
        """The same on the device, copied beside the computation that is still running; pinned memory makes it overlap."""
        if self._copy_in is None or incoming.hidden_BTH.device == self._device:
            return incoming
        with torch.cuda.stream(self._copy_in):
            on_device = incoming.map(lambda tensor: tensor.to(self._device, non_blocking=True))
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copy_in)
        for tensor in on_device.tensors.values():
            tensor.record_stream(computing)
        return on_device
