"""Rows as they lie in memory, all columns one after the other, as tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from m2ray.batches import Column
from m2ray.sites import BLOCK_CHANNELS

Values = Any
"""A torch.Tensor [..., W] at every site but router_topk; there a dict of such tensors by column."""


def tensors_of(columns: Sequence[Column], bytes_NB: torch.Tensor) -> Values:
    """The values of rows, uint8 [..., bytes of a row]. A single column lies in the same memory; rows in 8 bits are decoded, as float32."""
    if len(columns) == 1:
        return tensor_of(columns[0], bytes_NB)
    pieces = bytes_NB.split([column.row_bytes for column in columns], dim=-1)
    tensors = {column.name: tensor_of(column, piece.contiguous()) for column, piece in zip(columns, pieces, strict=True)}
    return decoded(tensors["activation"], tensors["scale"]) if "scale" in tensors else tensors


def tensor_of(column: Column, bytes_NB: torch.Tensor) -> torch.Tensor:
    """A column's values, uint8 [..., its bytes of a row], in the same memory."""
    dtype: torch.dtype = getattr(torch, column.dtype)
    # NumPy gives arrays without elements strides of 0, of which torch makes no view.
    return bytes_NB.view(dtype) if bytes_NB.numel() else bytes_NB.new_empty((*bytes_NB.shape[:-1], column.width), dtype=dtype)


def decoded(activation_NW: torch.Tensor, scale_NK: torch.Tensor) -> torch.Tensor:
    """Rows in 8 bits as float32 [..., W]: each channel times the scale of its block."""
    return activation_NW.float() * scale_NK.repeat_interleave(BLOCK_CHANNELS, dim=-1)[..., : activation_NW.shape[-1]]


def by_column(values: Values) -> dict[str, torch.Tensor]:
    """The same as the entries of a batch: `activations`, or each column by its name."""
    return values if isinstance(values, dict) else {"activations": values}
