"""A model's tensors as rows of one table: their shapes, bytes and places, and how they lie in the files. What planning counts on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from m2ray.batches import ITEMSIZE_BYTES, hidden_dtype

Role = Literal["embedding", "layer", "final_norm", "head", "unused"]

PACKED_GAP_BYTES = 1024
"""Beside a tensor's own bytes in a packed layer, at most, for each of the checkpoint's tensors with its scales: they keep their alignment."""

_KEPT_DTYPES = {4: "float32", 8: "int64"}
"""Of tensors whose dtype the compute dtype does not decide, by the bytes of an element."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the model as m2ray computes with it, or one of the checkpoint that m2ray leaves unread.

    Attributes:
        name: the parameter's or buffer's name in the transformers model (for unread ones, the checkpoint's key).
        role: where it belongs. "head" and "unused" (multi-token-prediction modules) are known and never loaded.
        layer: the decoder layer, or None where `role` is not "layer".
        shape: its shape in the model.
        itemsize_bytes: of its elements where the compute dtype does not decide: 4 for what stays in float32 (routers of some families),
            8 for tables of int64; else None.
        disk_bytes: bytes of all its checkpoint tensors, scales included.
        sources: the checkpoint keys it is made of, scales left out.
        method: how it is packed on disk, as a person is told it; "" where it is not quantised.
        lies_as: torch's name of the dtype in which its values lie in the files as they do in memory; "" where they are packed, or in another order.
            "float8_e4m3fn" of those that stay packed (m2ray.model.float8).
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    itemsize_bytes: int | None
    disk_bytes: int
    sources: tuple[str, ...]
    method: str = ""
    lies_as: str = ""

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def compute_bytes(self, itemsize_bytes: int) -> int:
        """Bytes in memory at a compute dtype of `itemsize_bytes` (2 or 4)."""
        return self.disk_bytes if self.stays_packed else self.num_elements * (self.itemsize_bytes or itemsize_bytes)

    @property
    def stays_packed(self) -> bool:
        """Whether it is computed with as the files have it, FP8 with its scales."""
        return self.lies_as == "float8_e4m3fn"

    def is_ready(self, compute_dtype: str) -> bool:
        """Whether its bytes in the files are those in memory, at that compute dtype."""
        return self.stays_packed or self.lies_as == (
            _KEPT_DTYPES.get(self.itemsize_bytes) if self.itemsize_bytes else hidden_dtype(compute_dtype)
        )


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a model and its checkpoint, derived from the meta skeleton and the index: what planning counts on.

    Attributes:
        hidden_size: of one token's hidden states; of several residual streams the sum.
        beside_elements, beside_bytes: what goes from stage to stage beside them, a token, at most: in the compute dtype, and in others.
        num_experts, experts_per_token: of a layer with a router, at most; 0 where none has one.
        layers_of: by site, the layers that have it, ascending; none at sites of the whole model. Sites that the model lacks are absent.
        hidden_itemsize_bytes: of hidden states between layers, where the compute dtype does not decide.
    """

    num_layers: int
    hidden_size: int
    rows: tuple[TensorRow, ...]
    beside_elements: int = 0
    beside_bytes: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    layers_of: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hidden_itemsize_bytes: int | None = None

    def handed_bytes(self, itemsize_bytes: int) -> int:
        """Bytes of one token from stage to stage, at most."""
        hidden_bytes = self.hidden_size * (self.hidden_itemsize_bytes or itemsize_bytes)
        return hidden_bytes + self.beside_elements * itemsize_bytes + self.beside_bytes

    def layer_bytes(self, itemsize_bytes: int) -> tuple[int, ...]:
        """Bytes in memory of each decoder layer, in order."""
        return self._of_layers(lambda row: row.compute_bytes(itemsize_bytes))

    def packed_bytes(self) -> tuple[int, ...]:
        """Bytes of each decoder layer as packed on disk, in order: in a GPU's or in host memory, in a file, and in a landing buffer."""
        return self._of_layers(lambda row: row.disk_bytes + PACKED_GAP_BYTES * (1 + len(row.sources)))

    def unpacked_bytes(self, compute_dtype: str) -> tuple[int, ...]:
        """Bytes of what of each decoder layer has to be unpacked, in another memory, before it runs: its part of the workspace.

        What lies in the files as it is computed with is used where it is.
        """
        itemsize_bytes = ITEMSIZE_BYTES[hidden_dtype(compute_dtype)]
        return self._of_layers(lambda row: 0 if row.is_ready(compute_dtype) else PACKED_GAP_BYTES + row.compute_bytes(itemsize_bytes))

    def _of_layers(self, bytes_of: Callable[[TensorRow], int]) -> tuple[int, ...]:
        totals = [0] * self.num_layers
        for row in self.rows:
            if row.layer is not None and row.role == "layer":
                totals[row.layer] += bytes_of(row)
        return tuple(totals)

    def role_bytes(self, role: Role, itemsize_bytes: int) -> int:
        """Bytes in memory of everything of one role."""
        return sum(row.compute_bytes(itemsize_bytes) for row in self.rows if row.role == role)

    def bytes_by_method(self, itemsize_bytes: int) -> dict[str, tuple[int, int]]:
        """By how the model's tensors are packed on disk, "" for those that are not quantised: their bytes there and in memory."""
        found: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            if row.role != "unused":
                on_disk, in_memory = found.get(row.method, (0, 0))
                found[row.method] = on_disk + row.disk_bytes, in_memory + row.compute_bytes(itemsize_bytes)
        return found

    @property
    def disk_bytes(self) -> int:
        """Bytes of every tensor in the checkpoint, loaded or not."""
        return sum(row.disk_bytes for row in self.rows)
