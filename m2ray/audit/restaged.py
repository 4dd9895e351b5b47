"""The same sequences through m2ray once more, in stages of another cut, one stage in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from m2ray.batches import LayerSpan, MicroBatch, PartSpec
from m2ray.model.boundary import Boundary, token_bytes
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import DTYPES, StageSpec, load_stage

_MOST_LAYERS = 4
_HELD_BYTES = 1 << 30

OnRows = Callable[[MicroBatch, PartSpec, torch.Tensor], None]
"""Takes a micro-batch, a site and layer, and its rows as a part has them: uint8 [N, bytes of a row]."""


def restage(
    spec: StageSpec, capture: CaptureSpec, micro_batches: Sequence[Callable[[], MicroBatch]], config: Any, seed: int, on_rows: OnRows
) -> dict[int | None, str]:
    """Take micro-batches through the layers of `spec.span`, which begins at layer 0, in stages of 1 to 4 layers that `seed` chooses.

    Memory holds one stage, and what 1 GiB of micro-batches and one more hand on: for more of them the stages are loaded again.

    Args:
        spec: what the stages have in common.
        capture: what is handed over.
        micro_batches: how to get each.
        config: the decoder's.
        seed: of the cut.
        on_rows: called for each micro-batch and each site and layer that is captured.

    Returns:
        The digests of what was loaded, as `weights.json` has them: by layer, and of what comes before them at None.

    Raises:
        CheckpointError, StoreError: the weights cannot be loaded.
        StageError: a row is not finite in the store dtype.
    """
    digests: dict[int | None, str] = {}
    handed_bytes = max(token_bytes(config, layer, DTYPES[spec.compute_dtype]) for layer in range(1, spec.span.stop + 1))
    for group in _groups(micro_batches, handed_bytes):
        boundaries: list[Boundary | None] = [None] * len(group)
        for span in _cut(spec.span, seed):
            stage = load_stage(_of_span(spec, span), lambda *_: None)
            stage.begin(capture)
            digests |= stage.digests
            for place, micro_batch in enumerate(group):
                output = stage.forward(micro_batch, boundaries[place])
                for part, captured in zip(stage.parts, output.captured, strict=True):
                    on_rows(micro_batch, part, torch.from_numpy(np.concatenate(captured.columns, axis=1)))
                boundaries[place] = None if output.boundary is None else output.on_host()
            del stage
    return digests


def _of_span(spec: StageSpec, span: LayerSpan) -> StageSpec:
    return replace(spec, span=span)


def _cut(span: LayerSpan, seed: int) -> list[LayerSpan]:
    rng, bounds = np.random.default_rng(seed), [span.start]
    while bounds[-1] < span.stop:
        bounds.append(min(span.stop, bounds[-1] + int(rng.integers(1, _MOST_LAYERS + 1))))
    return [LayerSpan(*ends) for ends in pairwise(bounds)]


def _groups(micro_batches: Sequence[Callable[[], MicroBatch]], handed_bytes: int) -> Iterator[list[MicroBatch]]:
    group: list[MicroBatch] = []
    for get in micro_batches:
        group.append(get())
        if sum(each.padded_tokens for each in group) * handed_bytes >= _HELD_BYTES:
            yield group
            group = []
    if group:
        yield group
