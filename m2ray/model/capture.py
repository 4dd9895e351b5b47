"""What is kept at a site: the chosen tokens' rows, selected and rounded on the device, then copied to the host."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartSpec
from m2ray.errors import StageError
from m2ray.model.eight_bits import Encoder, is_encoded
from m2ray.model.pinned import PinnedRuns
from m2ray.model.row_crcs import are_right, can_make_crcs, row_crcs
from m2ray.model.selecting import ChosenRows
from m2ray.model.statistics import Statistics
from m2ray.model.taking_rows import extremes_of
from m2ray.selection import Selection
from m2ray.sites import LayersOfSites
from m2ray.statistics import Asked

COPYING_LAYERS = 3
"""Layers of one micro-batch whose rows are on the GPU at one time: on their way to the host, or yet to be computed. With fewer the GPU waits
while the host launches the next layer."""

_HANDED_BYTES = 32 << 20
"""Of rows that are handed on at once, at least: telling of them takes the interpreter from the thread that launches layers, however few they are."""


@dataclass(frozen=True)
class CaptureSpec:
    """What a job takes of a model, the same for all its stages.

    Attributes:
        sites: what is kept, as the model has it.
        store_dtype: "bfloat16", "float16", "float32", "float8" or "int8", of rows of hidden width.
        selection: whose rows are kept.
        statistics: what is taken of which rows, of sites and layers whose rows are kept and of others (m2ray.statistics).
        with_crcs: whether a GPU makes the CRC32 of each row too: for a writer whose pages are the rows as they are.
    """

    sites: LayersOfSites
    store_dtype: str
    selection: Selection = field(default_factory=Selection)
    statistics: Asked = field(default_factory=dict)
    with_crcs: bool = False


@dataclass(frozen=True)
class _Rows:
    """One part's rows, a tensor [N, ...] a column, and the extremes of what each was rounded from (taking_rows), on the device or the host.

    Of a part that is captured for its statistics alone there are no rows. `crcs` are those of each column's rows (row_crcs), or none.
    """

    part: PartSpec
    columns: tuple[torch.Tensor, ...]
    crcs: tuple[torch.Tensor, ...]
    extremes: tuple[torch.Tensor, ...]
    statistics: Mapping[str, torch.Tensor]


class Capture:
    """What is kept of one micro-batch: some sites, after some layers.

    Rows are those of the chosen tokens, in the order of m2ray.selection. All others are left out before anything is copied, and every
    part's rows have memory of their own. On a GPU they are copied into pinned memory on a stream of their own, beside the
    computation: `finish` or `arriving` is what waits, and may be called on another thread.

    Attributes:
        copied: on a GPU, from `end` on, the end of all rows' way to the host.
    """

    def __init__(
        self,
        micro_batch: MicroBatch,
        parts: Sequence[PartSpec],
        selection: Selection,
        encoder: Encoder,
        copy_stream: "torch.cuda.Stream | None",
        statistics: Statistics | None = None,
        pinned: PinnedRuns | None = None,
        *,
        with_crcs: bool = False,
    ) -> None:
        """`pinned`: the host's memory for rows from a GPU; None takes what each part needs. `with_crcs`: as in CaptureSpec."""
        self._micro_batch = micro_batch
        self._pinned = pinned or PinnedRuns()
        self._kept = frozenset(parts)
        self._statistics = statistics or Statistics()
        self._parts = {(part.site, part.layer): part for part in (*parts, *self._statistics.kinds)}
        self._awaited = Counter(map(_place, self._parts.values()))
        self._encoder = encoder
        self._with_crcs = with_crcs
        self._copy_stream = copy_stream
        self._selection = selection
        self._chosen = ChosenRows(selection, micro_batch, copy_stream)
        self._taken: list[_Rows] = []
        self._captured: dict[PartSpec, _Rows] = {}
        self._copying: deque[torch.cuda.Event] = deque()
        self._copies: deque[tuple[torch.cuda.Event, list[PartSpec]]] = deque()
        """The end of each layer's rows' way to the host, and which they are."""
        self.copied: torch.cuda.Event | None = None

    def keep(self, site: str, layer: int | None, *values_BT: torch.Tensor) -> None:
        """Keep what stands at a site, if that part is asked for: a tensor [B, T, ...] a column, of which all that follows is the row."""
        part = self._parts.get((site, layer))
        if part is None:
            return
        if not self._taken:
            self._wait_for_room()
        selected, extremes = zip(*map(self._chosen.of, values_BT), strict=True)
        rounded = selected if is_encoded(part) else _rounded(part, selected)
        statistics = self._statistics.of(part, rounded)
        columns: tuple[torch.Tensor, ...] = ()
        if part in self._kept:
            columns = self._encoder.encode(part, *rounded) if is_encoded(part) else tuple(rounded)
        has_crcs = self._with_crcs and all(map(can_make_crcs, columns))
        self._taken.append(_Rows(part, columns, tuple(map(row_crcs, columns)) if has_crcs else (), extremes, statistics))
        self._awaited[_place(part)] -= 1
        if not self._awaited[_place(part)]:
            self._copy_out()

    def _copy_out(self) -> None:
        """Begin to copy what was taken, once the layer has shown all its sites: to wait for the GPU and to tell it costs as much for one as for all."""
        if self._copy_stream is None:
            self._captured |= {rows.part: rows for rows in self._taken}
        elif self._taken:
            self._copy_stream.wait_stream(torch.cuda.current_stream(self._copy_stream.device))
            with torch.cuda.stream(self._copy_stream):
                for rows in self._taken:
                    self._captured[rows.part] = self._on_host(rows)
                copied = torch.cuda.Event()
                copied.record(self._copy_stream)
                self._copying.append(copied)
                self._copies.append((copied, [rows.part for rows in self._taken]))
        self._taken.clear()

    def _on_host(self, rows: _Rows) -> _Rows:
        """One part's rows in pinned memory, and what goes with them."""
        columns, crcs = (
            tuple(self._copied_to(self._pinned.take(tuple(values.shape), values.dtype), values) for values in each)
            for each in (rows.columns, rows.crcs)
        )
        extremes, statistics = (
            [self._copied_to(_pinned_like(values), values) for values in few] for few in (rows.extremes, rows.statistics.values())
        )
        return _Rows(rows.part, columns, crcs, tuple(extremes), dict(zip(rows.statistics, statistics, strict=True)))

    def _copied_to(self, on_host: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        assert self._copy_stream is not None
        on_host.copy_(values, non_blocking=True)
        values.record_stream(self._copy_stream)
        return on_host

    def _wait_for_room(self) -> None:
        """Let the host wait: it runs ahead of the GPU, where rows keep their memory until they are copied."""
        while len(self._copying) >= COPYING_LAYERS:
            self._copying.popleft().synchronize()

    def finish(self) -> tuple[CapturedLayer, ...]:
        """All that was kept, in the order of the parts, once it is on the host.

        Raises:
            StageError: a row holds an infinity or no number at all, from the computation or from rounding to the store dtype.
        """
        if self.copied is not None:
            self.copied.synchronize()
        return self._handed_on([part for part in self._parts.values() if part in self._captured])

    def arriving(self) -> Iterator[tuple[CapturedLayer, ...]]:
        """What was kept on a GPU, layer after layer as it comes to the host, several at once where they are small. Instead of `finish`, and raises as that."""
        if not self._copies:
            yield ()
        parts: list[PartSpec] = []
        while self._copies:
            copied, of_layer = self._copies.popleft()
            parts += of_layer
            rows_bytes = sum(values.nbytes for part in parts for values in self._captured[part].columns)
            if rows_bytes >= _HANDED_BYTES or not self._copies:
                copied.synchronize()
                yield self._handed_on(parts)
                for part in parts:
                    del self._captured[part]
                parts = []

    def _handed_on(self, parts: Sequence[PartSpec]) -> tuple[CapturedLayer, ...]:
        """The rows of some parts, which are on the host. Raises as `finish`."""
        kept = [self._captured[part] for part in parts]
        for rows in kept:
            found = [extremes_of(each) for each in rows.extremes]
            # What is encoded has a scale, and so fits as it is.
            stored = found if is_encoded(rows.part) else _rounded(rows.part, found)
            for extremes, as_stored in zip(found, stored, strict=True):
                if not as_stored.isfinite().all():
                    raise self._not_finite(rows, extremes)
        return tuple(map(self._captured_layer, kept))

    def end(self) -> None:
        """No more layers come: mark the place in the copy stream that `finish` waits for."""
        self._copy_out()
        if self._copy_stream is not None:
            self.copied = torch.cuda.Event(enable_timing=True)
            self.copied.record(self._copy_stream)

    def _captured_layer(self, rows: _Rows) -> CapturedLayer:
        columns, statistics = tuple(map(_bits, rows.columns)), {kind: values.numpy() for kind, values in rows.statistics.items()}
        crcs = tuple(values.numpy().view(np.uint32) for values in rows.crcs)
        device = torch.device("cpu") if self._copy_stream is None else self._copy_stream.device
        is_right = all(are_right(*each, device) for each in zip(crcs, columns, strict=False))  # there may be none
        return CapturedLayer(rows.part.site, rows.part.layer, columns, statistics, crcs if is_right else ())

    def _not_finite(self, rows: _Rows, extremes: torch.Tensor) -> StageError:
        is_bad_N = [~values.float().isfinite().all(dim=1) for values in rows.columns]
        token_rows = self._selection.token_rows(self._micro_batch)
        ids = np.unique(token_rows["sequence_id"][torch.stack(is_bad_N).any(dim=0).numpy() if is_bad_N else slice(None)])
        listed = ", ".join(str(sequence_id) for sequence_id in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        smallest, largest = extremes.float().tolist()
        dtype = rows.part.columns[0].dtype
        return StageError(
            f"{str(rows.part).capitalize()}, sequences {listed}: values from {smallest:g} to {largest:g} do not fit {dtype}.",
            'Set compute_dtype and store_dtype to "bfloat16" or "float32"; if they are so already, the weights or the family are at fault.',
        )


def _place(part: PartSpec) -> int | str:
    """What is copied out at one time: a layer's parts, or that of a site of the whole model."""
    return part.site if part.layer is None else part.layer


def _pinned_like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def _rounded(part: PartSpec, selected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows in the dtypes of the part's columns, rounded once, to nearest even. `index_select` made a copy, which nothing computed later changes."""
    return [rows_NW.to(getattr(torch, column.dtype)) for rows_NW, column in zip(selected, part.columns, strict=True)]


def _bits(rows_NW: torch.Tensor) -> Bits:
    """The raw little-endian bytes of rows [N, W] on the host: uint8 [N, W * itemsize], the same memory."""
    bits: Bits = rows_NW.contiguous().view(torch.uint8).numpy()
    return bits
