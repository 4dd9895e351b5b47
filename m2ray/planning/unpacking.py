"""What unpacking a layer takes of a GPU's memory bandwidth, by how its tensors are packed."""

from collections.abc import Iterable, Mapping

from m2ray.batches import ITEMSIZE_BYTES, hidden_dtype
from m2ray.tensor_rows import TensorRow

UNPACK_SHARES: Mapping[str, float] = {
    "": 0.7,
    "FP8": 0.7,
    "MXFP8": 0.7,
    "int8": 0.7,
    "INT8": 0.05,
    "INT4": 0.45,
    "MXFP4": 0.35,
    "NVFP4": 0.35,
    "AWQ": 0.11,
    "GPTQ": 0.11,
}
"""By the first word of a method's name ("" is a change of dtype alone): of the bandwidth, bytes read and written while experts of MiniMax-M2's widths
are unpacked on an H200, 4.8 TB/s (benchmarks/results/unpacking_on_gpu.json): FP8 3.33 TB/s, INT4 2.0 to 2.3, MXFP4 1.7, NVFP4 1.7 to 1.8, AWQ
and GPTQ 0.5. MXFP8 and int8 are counted as FP8; INT8 in words, which has no kernel, as torch took 4 bits."""


def unpacking_bytes(rows: Iterable[TensorRow], num_layers: int, compute_dtype: str) -> tuple[float, ...]:
    """Of each layer, the bytes that a GPU's memory could move in the time in which it is unpacked. Raises KeyError: a method that the table lacks."""
    totals, itemsize_bytes = [0.0] * num_layers, ITEMSIZE_BYTES[hidden_dtype(compute_dtype)]
    for row in rows:
        if row.layer is not None and row.layer < num_layers and not row.is_ready(compute_dtype):
            moved_bytes = row.disk_bytes + row.compute_bytes(itemsize_bytes)
            totals[row.layer] += moved_bytes / UNPACK_SHARES[row.method.partition(" ")[0].rstrip(",")]
    return tuple(totals)
