"""The CRCs of a column chunk's pages, once more, in its metadata in the footer.

A page's header says whether its body is whole, but not whether the page is the one that was written there: one of another place, file or run is
whole too. The footer is under the digest of whoever wrote the file, and so are the CRCs in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2ray.parquet.crcs import Crcs

_KEY = b"page_crc32"


def footer_crcs(crcs: Crcs) -> dict[str, bytes]:
    """structs.KEY_VALUE of a chunk's pages, in their order: 8 hex digits each."""
    return {"key": _KEY, "value": crcs.astype(">u4").tobytes().hex().encode()}


def crcs_of(chunks: Sequence[Mapping[str, Any]]) -> Crcs | None:
    """Those of a column's chunks, uint32 [pages], of their structs.COLUMN_META_DATA; None if the file was written without them.

    Raises:
        ValueError: they are no such digits.
    """
    found = [pair["value"] for chunk in chunks for pair in chunk.get("key_value_metadata", ()) if pair["key"] == _KEY]
    if len(found) != len(chunks):
        return None
    return np.frombuffer(bytes.fromhex(b"".join(found).decode("ascii")), ">u4").astype(np.uint32)
