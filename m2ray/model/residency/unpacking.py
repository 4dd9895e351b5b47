"""A layer's run made into its tensors, in the workspace: by the fused kernel's table where that can, else piece by piece."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch

from m2ray.model.extents import RowsToLoad
from m2ray.model.filling import fill
from m2ray.model.quantization.fused import KernelTable, check_of, is_for_kernel
from m2ray.model.quantization.fused_proof import is_exact
from m2ray.model.residency.packed_layer import PackedLayer


class Unpacking:
    """How one layer is unpacked into one workspace, out of any run that is laid out as it has it."""

    def __init__(self, layer: PackedLayer, workspace: torch.Tensor, pool: ThreadPoolExecutor | None) -> None:
        """`pool`: threads among which the pieces are dealt out; None on a GPU."""
        device = workspace.device
        self._places = layer.places
        has_kernel: dict[bool, list[RowsToLoad]] = {True: [], False: []}
        for piece in _pieces(layer, workspace):
            has_kernel[is_for_kernel(piece, device) and is_exact(device)].append(piece)
        self._others = has_kernel[False]
        self._table = KernelTable()
        self._launches = list(self._add(has_kernel[True]))
        if self._launches:
            self._table.to(device)
        self._checks = [(piece, check) for piece in has_kernel[True] if (check := check_of(piece))]
        self._pool = pool

    def __call__(self, run: torch.Tensor) -> None:
        """Write the layer's tensors, on a GPU on the current stream."""
        while self._checks:  # once: the bytes stay what they are. One that fails, if for lack of memory alone, comes again
            wanted, check = self._checks[-1]
            check(self._parts(wanted, run))
            self._checks.pop()
        for lines in self._launches:
            self._table.run(run, lines)
        for _ in (self._pool.map if self._pool else map)(lambda wanted: self._fill(wanted, run), self._others):
            pass

    def _add(self, pieces: Sequence[RowsToLoad]) -> Iterator[slice]:
        """A launch for pieces of one shape, which have as many tiles: others would have programs with nothing to do."""
        for _, alike in groupby(sorted(pieces, key=_shape), _shape):
            first = len(self._table)
            for each in alike:
                self._table.add(each, {name: self._places[part] for name, part in each.parts.items()})
            yield slice(first, len(self._table))

    def _fill(self, wanted: RowsToLoad, run: torch.Tensor) -> None:
        fill(wanted, self._parts(wanted, run))

    def _parts(self, wanted: RowsToLoad, run: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: part.of(run, part.offset - self._places[part]) for name, part in wanted.parts.items()}


def _pieces(layer: PackedLayer, workspace: torch.Tensor) -> Iterator[RowsToLoad]:
    """What is unpacked, with its place in the workspace."""
    for each in layer.tensors:
        if each.pieces:
            values = each.view(workspace)
            for piece in each.pieces:
                into = piece.into
                at = values.storage_offset() + into.storage_offset()
                yield piece._replace(into=values.as_strided(into.size(), into.stride(), at))


def _shape(piece: RowsToLoad) -> tuple[int, ...]:
    return piece.values.shape
