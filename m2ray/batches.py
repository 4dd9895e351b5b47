"""The values that travel between the packages and between the actors.

Shape legend, used as suffixes of tensor and array names here and elsewhere:

    B  sequences in a micro-batch        T  positions, padded to the micro-batch's longest sequence
    N  real tokens (padding left out)    H  hidden width        W  a site's width in elements
    S  sequences in a shard              L  layers
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]
"""Raw little-endian bytes of activations, one row a token: uint8 [N, W * itemsize]."""

ITEMSIZE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "int16": 2, "int8": 1, "float8_e4m3fn": 1}
"""Bytes of one element of each dtype that a column may have, by torch's names."""

TOKEN_ROW = np.dtype([("sequence_id", "<i8"), ("position", "<i4"), ("token_id", "<i4")])
"""What every row of every part begins with. Digests are taken over arrays of this packed type."""

Role = Literal["embedding", "layer", "final_norm", "head", "unused"]


def hidden_dtype(compute_dtype: str) -> str:
    """Of hidden states and of all that is computed beside products, by torch's name: with "float8" they are bfloat16."""
    return "bfloat16" if compute_dtype == "float8" else compute_dtype


@dataclass(frozen=True)
class LayerSpan:
    """The contiguous decoder layers [start, stop) that one stage owns."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a span needs 0 <= start < stop, not [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.stop

    def __str__(self) -> str:
        return f"layers {self.start}-{self.stop - 1}"


Residency = Literal["gpu", "gpu_packed", "host", "checkpoint"]
"""Where a layer's weights live while it does not run: ready on its GPU; there, as packed on disk; so in host memory; or in the model's files alone.

Without a GPU "gpu" is in memory, ready, and "gpu_packed" is not used.
"""


MOST_SEQUENCES = 2**15 - 1
"""In a shard, at most. Each may be a micro-batch of its own, which is a row group, and Parquet numbers row groups by 16 bits: Rust's
readers refuse a file with more (apache/arrow-rs#10129)."""


@dataclass(frozen=True)
class Shard:
    """A fixed range of sequences: the unit of commit, retry and resume.

    `sequence_ids` is int64 [S], strictly ascending; with it go `token_counts` int32 [S] and `row_counts` int32 [S], the rows of each sequence
    in every part: as many as it has tokens where nothing else is said.
    """

    index: int
    sequence_ids: Int64Array
    token_counts: Int32Array
    row_counts: Int32Array = field(default=None)  # type: ignore[arg-type]  # __post_init__ gives it

    def __post_init__(self) -> None:
        if self.row_counts is None:
            object.__setattr__(self, "row_counts", self.token_counts)

    @property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum(dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Rows in each part."""
        return int(self.row_counts.sum(dtype=np.int64))


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a stage together, right-padded with token id 0.

    Its sequences are a run of its shard's, in the shard's order, so a part grows by whole micro-batches and never
    needs sorting. `index` counts within the shard; `is_last` marks the one that completes the shard.
    `token_ids_BT` is int32 [B, T], `sequence_ids` int64 [B], `token_counts` int32 [B]. `mask_BT`, bool [B, T], are the loss masks, where the
    choice of tokens goes by them.
    """

    shard: int
    index: int
    is_last: bool
    sequence_ids: Int64Array
    token_counts: Int32Array
    token_ids_BT: Int32Array
    mask_BT: npt.NDArray[np.bool_] | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.token_counts.sum(dtype=np.int64))

    @property
    def padded_tokens(self) -> int:
        return int(self.token_ids_BT.size)


@dataclass(frozen=True)
class PromptStats:
    """What prompts come to, cut into shards and micro-batches.

    Attributes:
        sequences, tokens: those that are extracted; quarantined rows are not counted.
        padded_tokens: tokens that are computed, padding included.
        longest_tokens: of one sequence.
        shards, micro_batches: in all.
        rows: in each part of all shards together; None for as many as tokens.
    """

    sequences: int
    tokens: int
    padded_tokens: int
    longest_tokens: int
    shards: int
    micro_batches: int
    rows: int | None = None

    @property
    def rows_a_token(self) -> float:
        """The share of the tokens that have rows, from 0 to 1 where a row is of one token."""
        return 1.0 if self.rows is None or not self.tokens else self.rows / self.tokens

    @property
    def padding_waste(self) -> float:
        """The share of computed tokens that are padding, from 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


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


class Column(NamedTuple):
    """One column of a part's values: its name, torch's name of their dtype, and how many a row has."""

    name: str
    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values."""
        return self.width * ITEMSIZE_BYTES[self.dtype]


@dataclass(frozen=True)
class PartSpec:
    """What every part of one site and layer has in common: enough to write it and to describe it in its footer.

    `layer` is None at sites of the whole model.
    """

    site: str
    layer: int | None
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, site: str, layer: int | None, dtype: str, width: int) -> Self:
        """Of a site with the one column `activation`."""
        return cls(site, layer, (Column("activation", dtype, width),))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory: all columns, which lie one after the other there."""
        return sum(column.row_bytes for column in self.columns)

    def __str__(self) -> str:
        return self.site if self.layer is None else f"{self.site} of layer {self.layer}"


@dataclass(frozen=True)
class CapturedLayer:
    """What a stage captured of one micro-batch at one site: the chosen tokens only, in the order of m2ray.selection.

    `layer` is None at sites of the whole model. `columns` are the values of the part's columns in their order, each uint8
    [N, W * itemsize], on the host; none where no rows are kept. `statistics` are those of these rows that were asked for, by their
    kind (m2ray.statistics). `crcs` are of each column the CRC32 of each row's bytes, uint32 [N], where a GPU has made them; else there are none.
    """

    site: str
    layer: int | None
    columns: tuple[Bits, ...]
    statistics: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    crcs: tuple[npt.NDArray[np.uint32], ...] = ()


@dataclass(frozen=True)
class PartReceipt:
    """A part as its writer left it: one Parquet object = one shard, one layer, one site, one attempt.

    Or, with the site `statistics` and no layer, what one stage contributes of a shard's statistics.

    Attributes:
        key: the object's key below the run folder.
        rows: in it: the shard's chosen tokens.
        num_bytes: the object's size.
        xxh3: xxh3-64 of all its bytes but the pages of its activation columns, 16 hex digits; in format 1 of all its bytes.
        token_digest: xxh3-128 over its TOKEN_ROW rows, 32 hex digits; equal in all parts of a shard.
        tail_bytes: bytes behind the last row group: page indexes and footer. None in format 1.
        tail_xxh3: xxh3-64 of these bytes, 16 hex digits. None in format 1.
    """

    shard: int
    attempt: str
    site: str
    layer: int | None
    key: str
    rows: int
    num_bytes: int
    xxh3: str
    token_digest: str
    tail_bytes: int | None = None
    tail_xxh3: str | None = None


@dataclass(frozen=True)
class SequenceFile:
    """One object below `sequences/` as its writer left it. `xxh3` is xxh3-64 of the whole object, 16 hex digits."""

    key: str
    rows: int
    num_bytes: int
    xxh3: str
