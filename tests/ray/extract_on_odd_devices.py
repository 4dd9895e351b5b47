"""`m2ray extract` with devices that this machine does not have: small ones, or two in a stage. Run by test_devices.py.

    python extract_on_odd_devices.py FITTING_TOKENS KIND [FLAG VALUE ...]

A device runs out of memory, as torch says it, on a micro-batch of more padded tokens than FITTING_TOKENS. KIND is "1" or "2" devices
in a stage, or "none": devices that hold no layer, so that of each stage one stays in host memory and the others on disk.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain import actor, specs
from m2ray.cli import main
from m2ray.model.stage import Stage, StageSpec


class SmallStage(Stage):
    fitting_tokens = 0

    def _pass(self, micro_batch: MicroBatch, *more: Any) -> Any:
        if micro_batch.padded_tokens > self.fitting_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super()._pass(micro_batch, *more)


class ActorWithSmallStages(actor.StageActor):
    fitting_tokens = int(sys.argv[1])

    def _build(self) -> None:
        super()._build()
        SmallStage.fitting_tokens = self.fitting_tokens
        for stage in self._passage.stages:
            stage.__class__ = SmallStage


def halves(*args: Any) -> Iterator[StageSpec]:
    for spec in one_spec(*args):
        middle = (spec.span.start + spec.span.stop) // 2
        for span in (LayerSpan(spec.span.start, middle), LayerSpan(middle, spec.span.stop)):
            yield replace(spec, span=span)


def nothing_resident(*args: Any) -> Iterator[StageSpec]:
    for spec in one_spec(*args):
        first, *others = range(spec.span.start, spec.span.stop)
        yield replace(spec, residency={first: "host", **dict.fromkeys(others, "checkpoint")}, wave_tokens=512)


actor.StageActor = ActorWithSmallStages
one_spec = specs._specs
specs._specs = {"1": one_spec, "2": halves, "none": nothing_resident}[sys.argv[2]]
sys.argv[1:] = ["extract", *sys.argv[3:]]
if __name__ == "__main__":
    main()
