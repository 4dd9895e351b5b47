"""The first step of a capture: the chosen tokens' rows, taken on the device that computed them."""

from typing import Any

import numpy.typing as npt
import torch

from m2ray.batches import MicroBatch
from m2ray.model.sending import send
from m2ray.model.taking_rows import extremes, take_rows
from m2ray.selection import Selection


class ChosenRows:
    """The rows of one micro-batch's chosen tokens, in the order of m2ray.selection.

    Args:
        selection: which they are.
        micro_batch: whose values are to come.
        copy_stream: of the GPU where they will be; None on a CPU.
    """

    def __init__(self, selection: Selection, micro_batch: MicroBatch, copy_stream: "torch.cuda.Stream | None") -> None:
        self._copy_stream = copy_stream
        self._places_N = self._on_device(selection.places(micro_batch))
        self._counts = self._on_device(selection.chosen_counts(micro_batch)) if selection.is_mean else None

    def of(self, values_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of [B, T, ...] the rows [N, W], a copy, and their extremes, as m2ray.model.taking_rows has them.

        Means are summed in float32, one token after the other, and are float32.
        """
        values_MW = values_BT.flatten(0, 1).flatten(1)
        if self._counts is None:
            return take_rows(values_MW, self._places_N)
        mean_NW = values_MW.index_select(0, self._places_N).float()
        if len(self._counts):
            # Its order of additions is that of the rows, on GPUs too, so a mean does not depend on what else is in the batch.
            mean_NW = torch.segment_reduce(mean_NW, "mean", lengths=self._counts, axis=0, unsafe=True)
        return mean_NW, extremes(mean_NW)

    def _on_device(self, numbers: npt.NDArray[Any]) -> torch.Tensor:
        found = torch.from_numpy(numbers)
        return found if self._copy_stream is None else send(found, self._copy_stream.device)
