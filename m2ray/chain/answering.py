"""A request's micro-batches in a stage, between those of a job."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from m2ray.batches import MicroBatch
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage
from m2ray.model.stage_output import StageOutput

if TYPE_CHECKING:
    from m2ray.model.taking import Taking


class Answering:
    """Computes them one at a time, through all layers at once. Used by the stage's computing thread alone."""

    def __init__(self) -> None:
        self._taken: tuple[CaptureSpec, list[Taking]] | None = None  # of the last, since a request has several

    def compute(
        self, stages: Sequence[Stage], capture: CaptureSpec, micro_batch: MicroBatch, boundary: Boundary | None
    ) -> list[StageOutput]:
        """What each device's span leaves of it. Raises as `Stage.taking` and `Stage.forward` do."""
        if self._taken is None or self._taken[0] != capture:
            self._taken = capture, [stage.taking(capture) for stage in stages]
        outputs: list[StageOutput] = []
        for stage, taking in zip(stages, self._taken[1], strict=True):
            outputs.append(stage.forward(micro_batch, boundary, taking))
            boundary = outputs[-1].boundary
        return outputs
