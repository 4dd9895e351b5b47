"""Rows as floats for NumPy, Arrow, pandas and polars: bfloat16, float16 and 8 bits become float32, without loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.floats import floats_of
from m2ray.batches import TOKEN_ROW, Bits, PartSpec


def values_of(catalogue: Catalogue, spec: PartSpec) -> dict[str, npt.NDArray[Any]]:
    """All committed rows of one site and layer by column, [N, W]: float32, and the whole numbers of router_topk as they are.

    Raises:
        RunDamagedError: a file is not what its commit says.
    """
    rows_NB = _rows(catalogue, spec)
    if spec.columns[0].name == "activation":
        return {"activation": floats_of(spec.columns, rows_NB)}
    values, start = {}, 0
    for column in spec.columns:
        stop = start + column.row_bytes
        values[column.name] = np.ascontiguousarray(rows_NB[:, start:stop]).view(column.dtype)
        start = stop
    return values


def table_of(catalogue: Catalogue, specs: Sequence[PartSpec], *, has_layer_axis: bool) -> Any:
    """The rows of one site as a pyarrow table: sequence_id, position, token_id, with a layer axis `layer`, and the values as lists of one length.

    Raises:
        RunDamagedError: a file is not what its commit says.
    """
    tables = []
    for spec in specs:
        pieces = [catalogue.open_part(spec, receipt).tokens() for receipt in catalogue.receipts_of(spec)]
        tokens = np.concatenate([np.empty(0, TOKEN_ROW), *pieces])
        columns: dict[str, Any] = {name: np.ascontiguousarray(tokens[name]) for name in TOKEN_ROW.names or ()}
        if has_layer_axis:
            columns["layer"] = np.full(len(tokens), spec.layer, np.int32)
        for name, values_NW in values_of(catalogue, spec).items():
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values_NW.reshape(-1)), values_NW.shape[1])
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _rows(catalogue: Catalogue, spec: PartSpec) -> Bits:
    receipts = catalogue.receipts_of(spec)
    rows_NB = np.empty((sum(receipt.rows for receipt in receipts), spec.row_bytes), np.uint8)
    start = 0
    for receipt in receipts:
        catalogue.open_part(spec, receipt).pages().read(0, rows_NB[start : start + receipt.rows])
        start += receipt.rows
    return rows_NB
