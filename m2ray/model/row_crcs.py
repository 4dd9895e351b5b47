"""CRC32s of captured rows, made by the GPU that has them: of a page's rows the writer makes its own, without reading a byte.

A CRC32 of a core's takes a call without Python's interpreter a page, 120,000 of them in two seconds of computation, and each has to ask for the interpreter again:
the thread that launches layers then waits for it more than for the GPU.
"""

import socket
import warnings
from functools import cache, partial
from math import gcd
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32

from m2ray.batches import Bits
from m2ray.model.kernel_proof import is_proved
from m2ray.parquet.column_chunks import rows_of_page
from m2ray.parquet.crcs import Crcs, crcs_of_bits, crcs_of_pages

_WORD_BYTES = 4
_UNITS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}
"""What a row is read as, by the bytes that it is whole numbers of."""

_TILE = {"ROWS": 16, "LANES": 32, "STAGES": 1}

_distrusted: set[torch.device] = set()


def can_make_crcs(rows_NW: torch.Tensor) -> bool:
    """Whether the device of these rows makes their CRC32s, and no wrong one of its was seen."""
    return rows_NW.device not in _distrusted and has_kernel(rows_NW.device, _unit_bytes(_row_bytes(rows_NW)))


def row_crcs(rows_NW: torch.Tensor) -> torch.Tensor:
    """The CRC32 of each row's bytes, as the bits of int32 [N], on the rows' device, of which `can_make_crcs` holds."""
    row_bytes = _row_bytes(rows_NW)
    unit_bytes = _unit_bytes(row_bytes)
    units = rows_NW.contiguous().view(_UNITS[unit_bytes])
    crcs = torch.empty(len(rows_NW), dtype=torch.int32, device=rows_NW.device)
    masks, of_zeros = _masks(row_bytes, rows_NW.device)
    if len(rows_NW):
        grid = (-(-len(rows_NW) // _TILE["ROWS"]),)
        sizes = len(rows_NW), masks.shape[1], row_bytes // unit_bytes
        _kernel()[grid](units, masks, crcs, of_zeros, *sizes, UNITS=_WORD_BYTES // unit_bytes, **_TILE)
    return crcs


def are_right(crcs: Crcs, rows: Bits, device: torch.device) -> bool:
    """Whether the CRC32s that a device has made, uint32 [N], are those of the rows, uint8 [N, bytes of a row], as they have come to the host: looked at on one of their pages.

    After a wrong one, of which a warning tells, none of this device is trusted any more, those on their way neither.
    """
    if len(rows) and device not in _distrusted:
        page_rows = rows_of_page(rows.shape[1])
        page = int(crcs[-1]) % -(-len(rows) // page_rows)  # any, as chance has it
        some = slice(page * page_rows, (page + 1) * page_rows)
        if crc32(np.ascontiguousarray(rows[some])) != crcs_of_pages(crcs[some], rows.shape[1], page_rows)[0]:
            _distrusted.add(device)
            warnings.warn(
                f"Rows' CRCs are computed without {_named(device)} from now on, which takes longer: it has made a wrong one. The rows themselves are not touched "
                "by this; pages that were written before can be held against their CRCs by `m2ray verify`.",
                RuntimeWarning,
                stacklevel=2,
            )
    return device not in _distrusted


def _named(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name} of {socket.gethostname()}"


def _row_bytes(rows_NW: torch.Tensor) -> int:
    return rows_NW.shape[1] * rows_NW.itemsize


def _unit_bytes(row_bytes: int) -> int:
    return gcd(row_bytes, _WORD_BYTES)


@cache
def _masks(row_bytes: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Which bits of a row's words, little-endian, each bit of its CRC32 is the parity of, int32 [32, words]; and the CRC32 of a row of zeros, as int32."""
    num_words = -(-row_bytes // _WORD_BYTES)
    changes = np.zeros((num_words * _WORD_BYTES, 8), np.uint32)
    changes[:row_bytes] = crcs_of_bits(row_bytes)
    of_words = changes.reshape(num_words, 32)
    masks = np.stack([np.packbits(of_words >> np.uint32(bit) & 1, axis=1, bitorder="little").view("<i4")[:, 0] for bit in range(32)])
    return torch.from_numpy(masks).to(device), int(np.uint32(crc32(bytes(row_bytes))).view(np.int32))


# -- proof ----------------------------------------------------------------------------------------------------------------


@cache
def has_kernel(device: torch.device, unit_bytes: int) -> bool:
    """Whether there is a kernel for this device, and it makes the CRC32s of rows of such units. Where there is none, the writer's threads do."""
    return is_proved(device, "Rows' CRCs are computed", partial(_problem, unit_bytes))


def _problem(unit_bytes: int, device: torch.device) -> str:
    """Of rows that take less than a turn of a program, a bit more, whole ones and a bit less; the last program's are not all there."""
    turn_bytes = _WORD_BYTES * _TILE["LANES"]
    for row_bytes in (unit_bytes, 3 * unit_bytes, turn_bytes + unit_bytes, 8 * turn_bytes, 48 * turn_bytes - unit_bytes):
        if _unit_bytes(row_bytes) == unit_bytes:
            rows = np.random.default_rng(row_bytes).integers(0, 256, (3 * _TILE["ROWS"] + 5, row_bytes), dtype=np.uint8)
            found = row_crcs(torch.from_numpy(rows).to(device)).cpu().numpy().view(np.uint32)
            if found.tolist() != [crc32(row) for row in rows]:
                return f"those of rows of {row_bytes} bytes are not zlib's"
    return ""


@cache
def _kernel() -> Any:
    from m2ray.model.row_crcs_kernel import make_crcs

    return make_crcs
