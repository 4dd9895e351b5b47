"""A Hugging Face data set as `save_to_disk` leaves it: Arrow streams, and two JSON files that name them. Written without `datasets`.

`state.json` is what `load_from_disk` looks for, and is written last: a data set that is not whole cannot be opened.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2ray.export.output import Output
from m2ray.storage import Data

Feature = Mapping[str, Any]
"""A column as `dataset_info.json` describes it."""


def value(dtype: str) -> Feature:
    """A column of single values."""
    return {"dtype": dtype, "_type": "Value"}


def values(dtype: str, length: int = -1) -> Feature:
    """A column of lists; "Sequence" is what data sets of all ages read."""
    return {"feature": value(dtype), "length": length, "_type": "Sequence"}


def matrix(dtype: str, shape: tuple[int, int]) -> Feature:
    """A column of matrices (Array2D)."""
    return {"shape": list(shape), "dtype": dtype, "_type": "Array2D"}


def field_of(name: str, feature: Feature) -> Any:
    """The pyarrow field of a column."""
    if feature["_type"] == "Value":
        return pa.field(name, pa.type_for_alias(feature["dtype"]))
    if feature["_type"] == "Sequence":
        return pa.field(name, pa.list_(pa.type_for_alias(feature["feature"]["dtype"]), feature["length"]))
    # The extension type by which datasets knows a matrix, over lists of lists.
    metadata = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([feature["shape"], feature["dtype"]]),
    }
    return pa.field(name, pa.list_(pa.list_(pa.type_for_alias(feature["dtype"]))), metadata=metadata)


def lists(arrays: Sequence[npt.NDArray[Any]], dtype: str) -> Any:
    """A pyarrow array of lists, one an array."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays).astype(dtype)))


def matrices(numbers: npt.NDArray[Any]) -> Any:
    """A pyarrow array of the matrices of an array [N, A, B]; nothing is copied."""
    count, height, width = numbers.shape
    rows = pa.ListArray.from_arrays(np.arange(count * height + 1, dtype=np.int32) * width, pa.array(numbers.reshape(-1)))
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * height, rows)


def stream_of(features: Mapping[str, Feature], batches: Iterable[Mapping[str, Any]]) -> Iterator[Data]:
    """The pieces of an Arrow stream of these record batches, given as one pyarrow array a column; a piece is made when it is asked for."""
    info = json.dumps({"info": {"features": dict(features)}})
    schema = pa.schema([field_of(name, feature) for name, feature in features.items()], metadata={"huggingface": info})
    sink = _Pieces()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        for columns in batches:
            writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
            yield from sink.take()
    yield from sink.take()


class _Pieces:
    """What pyarrow writes to, until it is taken."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[Data] = []

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> list[Data]:
        pieces, self._pieces = self._pieces, []
        return pieces


def data_file(number: int, count: int) -> str:
    """The name of one of a data set's files."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def write_description(
    output: Output, features: Mapping[str, Feature], files: Sequence[str], fingerprint: str, format_type: str | None
) -> None:
    """The two JSON files that make the Arrow files a data set, whose rows come in the format "torch" or, with None, as Python values."""
    info = {"citation": "", "description": "", "features": dict(features), "homepage": "", "license": ""}
    output.write("dataset_info.json", [json.dumps(info, indent=2).encode()])
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": format_type,
        "_output_all_columns": False,
        "_split": None,
    }
    output.write("state.json", [json.dumps(state, indent=2).encode()])
