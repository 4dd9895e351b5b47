"""What is kept of a layer's output: the real tokens' rows, selected and rounded on the device, then copied to the host."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from m2ray import selection
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartSpec
from m2ray.errors import StageError
from m2ray.model.pinned import PinnedRuns

COPYING_LAYERS = 3
"""Layers of one micro-batch whose rows are on the GPU at one time: on their way to the host, or yet to be computed."""


@dataclass(frozen=True)
class CaptureSpec:
    """What a job takes of a model, the same for all its stages.

    Attributes:
        sites: the layers whose rows are kept, ascending, by site; there is "residual".
        store_dtype: "bfloat16", "float16" or "float32".
    """

    sites: Mapping[str, tuple[int, ...]]
    store_dtype: str


@dataclass(frozen=True)
class _Rows:
    """One layer's rows on their way to the host, and the extremes [2] of what they were rounded from."""

    layer: int
    rows_NW: torch.Tensor
    extremes: torch.Tensor


class ResidualCapture:
    """The residual stream after some layers, of one micro-batch.

    Rows are those of the chosen tokens, in the order of m2ray.selection. Padding is left out before anything is copied, and every
    layer's rows have memory of their own. On a GPU they are copied into pinned memory on a stream of their own, beside the
    computation: `finish` is what waits, and may be called on another thread.
    """

    def __init__(
        self,
        micro_batch: MicroBatch,
        parts: Iterable[PartSpec],
        store_dtype: torch.dtype,
        copy_stream: "torch.cuda.Stream | None",
        run_rows: int = 0,
    ) -> None:
        """`run_rows`: of pinned memory, as PinnedRuns takes them."""
        self._micro_batch = micro_batch
        self._runs = PinnedRuns(run_rows)
        self._layers = frozenset(part.layer for part in parts)
        self._store_dtype = store_dtype
        self._copy_stream = copy_stream
        places_N = torch.from_numpy(selection.places(micro_batch))
        # From pinned memory the host need not wait for the computation that is still running.
        self._places_N = places_N if copy_stream is None else places_N.pin_memory().to(copy_stream.device, non_blocking=True)
        self._captured: list[_Rows] = []
        self._copying: deque[torch.cuda.Event] = deque()

    def __call__(self, layer: int, hidden_BTH: torch.Tensor) -> None:
        """Keep layer `layer`'s rows of its output, [B, T, H] or [B, T, S, H], if they are asked for; of several streams all, side by side."""
        if layer not in self._layers:
            return
        self._wait_for_room()
        selected_NW = hidden_BTH.flatten(0, 1).index_select(0, self._places_N).flatten(1)
        extremes = torch.stack(torch.aminmax(selected_NW))
        # Rounds once, to nearest even; index_select made a copy, so nothing computed later can change these rows.
        rounded_NW = selected_NW.to(self._store_dtype)
        on_host_NW = self._to_host(rounded_NW, hidden_BTH.shape[0] * hidden_BTH.shape[1])
        self._captured.append(_Rows(layer, on_host_NW, self._to_host(extremes, 0)))
        if self._copy_stream is not None:
            self._copying.append(torch.cuda.Event())
            self._copying[-1].record(self._copy_stream)

    def _wait_for_room(self) -> None:
        """Let the host wait: it runs ahead of the GPU, where rows keep their memory until they are copied."""
        while len(self._copying) >= COPYING_LAYERS:
            self._copying.popleft().synchronize()

    def _to_host(self, values: torch.Tensor, room: int) -> torch.Tensor:
        """A copy in pinned memory of `room` rows, of which sizes vary little; 0: of its own, which is small."""
        if self._copy_stream is None:
            return values
        self._copy_stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._copy_stream):
            if room:
                parts_left = len(self._layers) - len(self._captured)
                on_host = self._runs.take((room, *values.shape[1:]), values.dtype, parts_left)[: len(values)]
            else:
                on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
        values.record_stream(self._copy_stream)
        return on_host

    def finish(self) -> tuple[CapturedLayer, ...]:
        """All that was kept, in the order of layers, once it is on the host.

        Raises:
            StageError: a row holds an infinity or no number at all, from the computation or from rounding to the store dtype.
        """
        if self._copy_stream is not None:
            self._copied.synchronize()
        for rows in self._captured:
            if not rows.extremes.to(self._store_dtype).isfinite().all():
                raise self._not_finite(rows)
        return tuple(CapturedLayer("residual", rows.layer, _bits(rows.rows_NW)) for rows in self._captured)

    def end(self) -> None:
        """No more layers come: mark the place in the copy stream that `finish` waits for."""
        if self._copy_stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(self._copy_stream)

    def _not_finite(self, rows: _Rows) -> StageError:
        is_bad_N = ~rows.rows_NW.isfinite().all(dim=1).numpy()
        ids = np.unique(selection.token_rows(self._micro_batch)["sequence_id"][is_bad_N])
        listed = ", ".join(str(sequence_id) for sequence_id in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        smallest, largest = rows.extremes.float().tolist()
        dtype = str(self._store_dtype).removeprefix("torch.")
        return StageError(
            f"Layer {rows.layer}, sequences {listed}: values from {smallest:g} to {largest:g} do not fit {dtype}.",
            'Set compute_dtype and store_dtype to "bfloat16" or "float32"; if they are so already, the weights or the family are at fault.',
        )


def pin_host_memory(num_bytes: int, padded_tokens: int, row_width: int, store_dtype: torch.dtype) -> None:
    """Take pinned memory for `num_bytes` of captured rows and leave it to torch, which keeps it for the micro-batches to come.

    Pinning takes long, and the computation would have to wait for it.

    Args:
        padded_tokens: of a full micro-batch, whose rows of one layer lie in one piece.
        row_width: elements of a row.

    Raises:
        StageError: the system does not give so much.
    """
    piece_bytes = padded_tokens * row_width * store_dtype.itemsize
    try:
        pieces = [torch.empty((padded_tokens, row_width), dtype=store_dtype, pin_memory=True) for _ in range(-(-num_bytes // piece_bytes))]
    except RuntimeError as error:
        raise StageError(
            f"{num_bytes:,} bytes of pinned host memory for captured rows cannot be had: {str(error).splitlines()[0]}.",
            "Allow the process to lock more memory (ulimit -l), or begin another run with lower batch_tokens or fewer layers.",
        ) from error
    del pieces


def _bits(rows_NW: torch.Tensor) -> Bits:
    """The raw little-endian bytes of rows [N, W] on the host: uint8 [N, W * itemsize], the same memory."""
    bits: Bits = rows_NW.contiguous().view(torch.uint8).numpy()
    return bits
