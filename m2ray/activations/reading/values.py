"""Rows as they lie in memory, all columns one after the other, as tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from m2ray.batches import Column

Values = Any
"""A torch.Tensor [..., W] of parts that have the one column `activation`; of others a dict of such tensors by column."""


def tensors_of(columns: Sequence[Column], bytes_NB: torch.Tensor) -> Values:
    """The values of rows, uint8 [..., bytes of a row]. Where there is one column they lie in the same memory."""
    if [column.name for column in columns] == ["activation"]:
        return bytes_NB.view(getattr(torch, columns[0].dtype))
    pieces = bytes_NB.split([column.row_bytes for column in columns], dim=-1)
    return {column.name: piece.contiguous().view(getattr(torch, column.dtype)) for column, piece in zip(columns, pieces, strict=True)}


def by_column(values: Values) -> dict[str, torch.Tensor]:
    """The same as the entries of a batch: `activations`, or each column by its name."""
    return values if isinstance(values, dict) else {"activations": values}
