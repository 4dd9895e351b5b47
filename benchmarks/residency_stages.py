"""Stages of MiniMax-M2's real dimensions that run waves of one micro-batch again and again (residency_on_gpu)."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.against_guide import TINY
from benchmarks.checkpoints import real_size
from benchmarks.gpu_stage import micro_batch
from m2ray.batches import CapturedLayer, LayerSpan, MicroBatch, Residency
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage

if TYPE_CHECKING:
    from m2ray.model.stage_output import StageOutput

SHAPE, TINY_SHAPE = (32, 512), (2, 32)


class Bench:
    """The model, and stages of it that run waves of one micro-batch again and again."""

    def __init__(self, folder: Path, tiny: bool, beside: Path | None) -> None:  # noqa: FBT001 - an option's value
        self.folder, self.tiny, self.beside = folder, tiny, beside
        self.device = "cpu" if tiny else "cuda:0"
        self.shape = TINY_SHAPE if tiny else SHAPE
        self.batch = micro_batch(self.shape)
        self.batch.token_ids_BT[:] %= 500 if tiny else 4000

    def model(self, layers: int) -> Path:
        return real_size(self.folder, layers, TINY if self.tiny else None)

    def load(self, layers: int, residency: Mapping[int, Residency] | None = None, wave: int = 0, *, compiled: bool = True) -> Stage:
        began = time.monotonic()
        spec = StageSpec(
            str(self.model(layers)),
            LayerSpan(0, layers),
            "bfloat16",
            "auto",
            self.device,
            None,
            compile=compiled and not self.tiny,
            residency=residency or {},
            wave_tokens=wave,
        )
        stage = load_stage(spec, lambda *_: None)
        places = "+".join(sorted(set((residency or {}).values()))) or "ready"
        print(f"{layers} layers {places}: loaded in {time.monotonic() - began:.1f} s, {allocated() / 1e9:.2f} GB on the GPU", flush=True)
        return stage

    def wave_s(self, stage: Stage, tokens: int) -> float:
        """Seconds of a wave of so many tokens, nothing captured, the mean of two after one."""
        batches = [self.batch] * max(1, tokens // (self.shape[0] * self.shape[1]) if not self.tiny else 3)
        run_wave(stage, batches)
        synchronize()
        began = time.monotonic()
        for _ in range(2):
            run_wave(stage, batches)
        synchronize()
        return (time.monotonic() - began) / 2

    def rows(self, stage: Stage, layers: int, num_batches: int) -> dict[int, list[bytes]]:
        """What layers 0 to `layers` give of as many micro-batches, all in one wave; they differ."""
        tokens = self.batch.token_ids_BT
        batches = [
            MicroBatch(0, number, True, self.batch.sequence_ids, self.batch.token_counts, np.roll(tokens, number + 1, axis=1))
            for number in range(num_batches)
        ]
        stage.begin(CaptureSpec({"residual": tuple(range(layers))}, "bfloat16"))
        found: dict[int, list[bytes]] = {}
        for captured in run_wave(stage, batches):
            for one in captured:
                assert one.layer is not None
                found.setdefault(one.layer, []).append(one.columns[0].tobytes())
        stage.begin(CaptureSpec({}, "bfloat16"))
        return found


def run_wave(stage: Stage, batches: list[MicroBatch]) -> list[tuple[CapturedLayer, ...]]:
    """Take the batches through the stage as one wave; what was captured, as it came."""
    under_way: deque[StageOutput] = deque()
    captured = []
    for output in stage.forward_wave(deque((batch, None) for batch in batches)):
        under_way.append(output)
        if len(under_way) > 2:
            captured.append(under_way.popleft().captured)
    return captured + [output.captured for output in under_way]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak(step: Callable[[], object]) -> int:
    """Bytes that a step takes on the GPU beyond those that are allocated."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = allocated()
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) - before


def all_in(where: Residency, layers: int) -> Mapping[int, Residency]:
    return dict.fromkeys(range(layers), where)


def bitwise(one: Mapping[int, list[bytes]], other: Mapping[int, list[bytes]]) -> str:
    """In words, how many micro-batches' rows of how many layers are equal. Raises AssertionError if any are not."""
    differing = [layer for layer, rows in one.items() if rows != other[layer]]
    assert one, "nothing was compared"
    assert not differing, f"rows of layers {differing} differ"
    return f"rows of {len(one)} layers and {len(one[0])} micro-batches equal bit by bit"


def tokens_of(bench: Bench, wave: int) -> int:
    return 3 * bench.shape[0] * bench.shape[1] if bench.tiny else wave
