"""The mean norm of a layer's rows, of all or of some that are spread evenly."""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from m2ray.activations.manifest import receipts_of
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.floats import Float32Array, floats_of
from m2ray.batches import PartReceipt, PartSpec

_READ_BYTES = 4 << 20
_SUMMED_BYTES = 256 << 10
"""Of rows that are summed at once: what becomes of them stays in a core's cache, five times as fast as 2,048 rows of M2's width."""


def mean_norm(catalogue: Catalogue, spec: PartSpec, most_rows: int | None) -> float:
    """The mean L2 norm of the committed rows, summed in float64; NaN if there are none. Raises RunDamagedError or StoreError."""
    total, num_rows = 0.0, 0
    read_rows, summed_rows = (max(1, num_bytes // spec.row_bytes) for num_bytes in (_READ_BYTES, _SUMMED_BYTES))
    for receipt, rows in _spread(catalogue, spec, most_rows):
        pages = catalogue.open_part(spec, receipt).pages()
        for start in range(0, rows, read_rows):
            bits = np.empty((min(read_rows, rows - start), spec.row_bytes), np.uint8)
            pages.read(start, bits)
            total += sum(_norms(floats_of(spec.columns, bits[at : at + summed_rows])) for at in range(0, len(bits), summed_rows))
        num_rows += rows
    return total / num_rows if num_rows else float("nan")


def _norms(rows_NW: Float32Array) -> float:
    """The sum of the rows' norms."""
    with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
        wide_NW = rows_NW.astype(np.float64)
        return float(np.sqrt(np.einsum("nw,nw->n", wide_NW, wide_NW)).sum())


def _spread(catalogue: Catalogue, spec: PartSpec, most_rows: int | None) -> Iterator[tuple[PartReceipt, int]]:
    """Parts that have rows, and how many of their first ones make no more than `most_rows` in all."""
    parts = catalogue.parts_of(spec)
    parts = parts.filter(pc.greater(parts["rows"], 0))
    num_rows = pc.sum(parts["rows"]).as_py() or 0
    if most_rows is not None and num_rows > most_rows:
        count = math.ceil(len(parts) * most_rows / num_rows)
        parts = parts.take([(2 * place + 1) * len(parts) // (2 * count) for place in range(count)])
        for receipt in receipts_of(parts):
            yield receipt, min(receipt.rows, most_rows // count)
    else:
        yield from ((receipt, receipt.rows) for receipt in receipts_of(parts))
