"""One decoder layer of a model's real dimensions with random weights, for its speed alone: config.json is all it takes."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from m2ray.batches import LayerSpan
from m2ray.errors import ClusterError
from m2ray.model.boundary import Boundary, blank
from m2ray.model.decoder import DecoderSpan
from m2ray.model.filling import assign
from m2ray.model.skeleton import build_skeleton
from m2ray.toolchain import require_triton

_TILE = 2**20
_COPY_BYTES = 1 << 28
_REPEATS = 5
_MOST_MS = 5_000.0


class TrialLayer:
    """The middle layer of a model, since some begin with layers of another kind.

    Args:
        config: transformers' configuration.
        compute_dtype: of its weights and of what it is given.
        device: "cuda:0" or "cpu".

    Attributes:
        number: which layer it is.

    Raises:
        CheckpointError, ConfigError: as `build_skeleton`.
        ClusterError: the GPU has no room for one layer.
    """

    def __init__(self, config: Any, compute_dtype: torch.dtype, device: str) -> None:
        skeleton = build_skeleton(config, compute_dtype)
        self.number = len(skeleton.layers) // 2
        self._dtype = compute_dtype
        self._device = torch.device(device)
        self._decoder = DecoderSpan(skeleton, LayerSpan(self.number, self.number + 1), self._device)
        with _room("a layer's weights"):
            for tensor in skeleton.needed(self._decoder.span):
                assign(skeleton.model, tensor.name, random_values(tensor.shape, tensor.dtype, self._device))
        self._decoder.check_complete()

    def compile(self) -> None:
        """Compile the layer; its next passes take longer. Raises StageError where a GPU's machine lacks what Triton needs."""
        if self._device.type == "cuda":
            require_triton("compile = true")
        self._decoder.compile_layers()

    def times_ms(self, shapes: list[tuple[int, int]]) -> list[float]:
        """The layer's milliseconds for each of the shapes [B, T]: medians, after every shape has been seen twice.

        Raises:
            ClusterError: a shape needs more memory than the GPU has.
        """
        steps = [self._step(shape) for shape in shapes]
        with _room(f"{max(math.prod(shape) for shape in shapes):,} tokens"), torch.inference_mode():
            for _ in range(2):  # the second round ends torch.compile's work: only then it knows that shapes change
                for step in steps:
                    step()
            return [statistics.median(self._times_ms(step)) for step in steps]

    def _step(self, shape: tuple[int, int]) -> Callable[[], object]:
        token_ids_BT = torch.zeros(shape, dtype=torch.int64, device=self._device)
        boundary = self._boundary(shape) if self._decoder.span.start else None
        # Some layers work in place; a copy is what a stage computes on as well.
        return lambda: self._decoder.run(token_ids_BT, None if boundary is None else boundary.map(torch.clone), lambda *_: None)

    def _boundary(self, shape: tuple[int, int]) -> Boundary:
        boundary = blank(self._decoder.skeleton.config, self._decoder.span.start, shape, self._dtype)
        hidden_BTH = random_values(tuple(boundary.hidden_BTH.shape), self._dtype, self._device)
        return boundary.map(lambda tensor: tensor.to(self._device))._replace(hidden_BTH=hidden_BTH)

    def _times_ms(self, step: Callable[[], object]) -> list[float]:
        """Several passes, fewer where they would take more than a few seconds."""
        times_ms: list[float] = []
        while len(times_ms) < _REPEATS and sum(times_ms) < _MOST_MS:
            self._wait()
            began = time.perf_counter()
            step()
            self._wait()
            times_ms.append((time.perf_counter() - began) * 1e3)
        return times_ms

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def copy_bytes_per_s(device: str) -> float:
    """From a GPU to pinned host memory: a median of several copies."""
    on_device = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    on_host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    rates = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        on_host.copy_(on_device, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(_COPY_BYTES / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values, of a size that keeps sums of order one; a vector is all ones, so that no router's bias chooses the experts, a table all zeros.

    The CPU repeats a million values: drawing billions takes minutes.
    """
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype, device=device)
    scale = 1 / math.sqrt(shape[-1])
    if device.type == "cuda":
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale)
    values = torch.empty(shape, dtype=dtype)
    tile = (torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    for piece in values.view(-1).split(_TILE):
        piece.copy_(tile[: len(piece)])
    return values


@contextmanager
def _room(what: str) -> Iterator[None]:
    """Turn a GPU's lack of memory into an error of ours."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ClusterError(f"The GPU has no room for {what}: {error}.", "Set batch_tokens lower, or end what holds its memory.") from error
