"""The values that travel between the packages and between the actors.

Shape legend, used as suffixes of tensor and array names here and elsewhere:

    B  sequences in a micro-batch        T  positions, padded to the micro-batch's longest sequence
    N  real tokens (padding left out)    H  hidden width        W  a site's width in elements
    S  sequences in a shard              L  layers
"""

from collections.abc import Mapping
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
