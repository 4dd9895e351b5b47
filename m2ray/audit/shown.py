"""What a run has to have of the values that transformers' model shows: the chosen tokens' rows, as a part holds them."""

from collections.abc import Sequence

import numpy as np
import torch

from m2ray.batches import MicroBatch, PartSpec
from m2ray.model.eight_bits import Encoder, is_encoded
from m2ray.selection import Selection


def chosen(values_BTW: torch.Tensor, selection: Selection, micro_batch: MicroBatch) -> torch.Tensor:
    """Of values [B, T, W] the chosen tokens' rows [N, W], or their sums in float32, row after row, over their numbers."""
    rows_NW = values_BTW.flatten(0, 1)[torch.from_numpy(selection.places(micro_batch))]
    if not selection.is_mean:
        return rows_NW
    counts = selection.chosen_counts(micro_batch).tolist()
    means = [np.add.reduce(rows.float().numpy(), axis=0) / np.float32(len(rows)) for rows in rows_NW.split(counts)] if counts else []
    return torch.from_numpy(np.stack(means)) if means else rows_NW.float()


def stored(part: PartSpec, rows_NW: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of the values that a site shows as a part has them: uint8 [N, bytes of a row]."""
    plain = (rows.to(getattr(torch, column.dtype)) for column, rows in zip(part.columns, rows_NW, strict=False))
    columns = Encoder().encode(part, rows_NW[0]) if is_encoded(part) else tuple(plain)
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)
