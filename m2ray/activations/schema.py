"""What a part looks like: its key below the run folder, its columns, and the footer metadata that names what is in it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2ray.batches import Column, PartSpec
from m2ray.errors import ConfigError, StoreError
from m2ray.parquet.column_chunks import EncodedColumns, encode_integers
from m2ray.storage import Store

FORMAT_VERSION = 2
"""Of the run folder. It grows when an older m2ray would misread what a newer one writes."""

LAYER_CONVENTION = "residual of layer i is the output of decoder layer i, before the final norm"

LEASE_FOLDER = "_lease"
"""Where drivers say that they are at work (lease.py). Of readers only a stream that waits for rows looks there (arrivals.py)."""

CONTRIBUTIONS = "_statistics"
"""Where shards' statistics lie until they are merged."""

METADATA_PREFIX = "m2ray."
ORIGIN = ("model", "prompts", "versions")
"""Of the footer's keys those that say for people where rows come from, as far as job.json names it."""

Compression = Literal["none", "planes"]
"""How a part stores its activations: as they are, or those of 16 bits as two planes of bytes (planes.py)."""

TOKEN_FIELDS = (
    pa.field("sequence_id", pa.int64(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
    pa.field("token_id", pa.int32(), nullable=False),
)
"""The columns that every part begins with, in TOKEN_ROW's order."""

PART_NAME = r"data/(?:[^/.][^/]*/)+shard-(?P<shard>\d{6,})-(?P<attempt>[0-9a-z]+)\.parquet"
"""What a part's key looks like. No piece of it is empty or begins with ".": a record that names another key would lead out of the run."""

CONTRIBUTION_NAME = rf"{CONTRIBUTIONS}/shard-(?P<shard>\d{{6,}})-(?P<attempt>[0-9a-z]+)-[a-z_]+(?:-\d{{3,}})?\.safetensors"
"""What the key of a shard's statistics looks like."""

_TOKEN_ENCODING = {"dictionary": ("sequence_id", "token_id"), "delta": ("position",), "statistics": ("sequence_id", "position")}


def encode_tokens(token_rows: npt.NDArray[Any]) -> EncodedColumns:
    """The token columns of TOKEN_ROW [N], encoded: made once, written into every part."""
    arrays = [pa.array(np.ascontiguousarray(token_rows[field.name]), type=field.type) for field in TOKEN_FIELDS]
    return encode_integers(pa.Table.from_arrays(arrays, schema=pa.schema(TOKEN_FIELDS)), **_TOKEN_ENCODING)


def part_key(spec: PartSpec, shard: int, attempt: str) -> str:
    """The key of one part: `data/site=residual/layer=007/shard-000012-<attempt>.parquet`.

    Model-wide sites have no `layer=` folder. `attempt` is of lower-case letters and digits.
    """
    key = f"{part_folder(spec)}/{part_name(shard, attempt)}"
    assert parse_part_key(key) == (shard, attempt), f"{key} cannot be read back"
    return key


def part_folder(spec: PartSpec) -> str:
    """Where all parts of a kind lie."""
    return f"data/site={spec.site}" + ("" if spec.layer is None else f"/layer={spec.layer:03d}")


def part_name(shard: int, attempt: str) -> str:
    """What all parts of an attempt are called, each in its folder."""
    return f"shard-{shard:06d}-{attempt}.parquet"


def parse_part_key(key: str) -> tuple[int, str] | None:
    """(shard, attempt) of a part's key; None for any other key."""
    match = re.fullmatch(PART_NAME, key)
    return (int(match["shard"]), match["attempt"]) if match else None


def contribution_key(shard: int, attempt: str, site: str, layer: int | None) -> str:
    """The key of what one stage contributes of a shard; `site` and `layer` are the first of which it has any."""
    return f"{CONTRIBUTIONS}/shard-{shard:06d}-{attempt}-{site}" + ("" if layer is None else f"-{layer:03d}") + ".safetensors"


def parse_contribution_key(key: str) -> tuple[int, str] | None:
    """(shard, attempt) of a contribution's key; None for any other key."""
    found = re.fullmatch(CONTRIBUTION_NAME, key)
    return (int(found["shard"]), found["attempt"]) if found else None


def stored_parts(store: Store, parts: Iterable[PartSpec]) -> dict[str, int]:
    """Key and bytes of every stored part of these kinds, whether it counts or not: of each file whose key `part_key` would give. One listing.

    Raises:
        StoreError: it cannot be listed, or a link stands where a folder of parts belongs.
    """
    folders = {part_folder(spec) for spec in parts}
    on_the_way = folders | {folder.rpartition("/")[0] for folder in folders}
    stored = {}
    for key, num_bytes in store.list_folders("data", sorted(folders)):
        folder, _, name = key.rpartition("/")
        if key in on_the_way:
            remedy = "Put the folder itself in its place; the whole run folder may be a link."
            raise StoreError(f"{store.where(key)} is a link or a file where a folder of parts belongs.", remedy)
        if folder in folders and (named := parse_part_key(key)) and name == part_name(*named):
            stored[key] = num_bytes
    return stored


def part_metadata(
    spec: PartSpec,
    run_metadata: Mapping[str, str],
    shard: int,
    attempt: str,
    compression: Compression = "none",
) -> dict[str, str]:
    """The footer's key-value pairs, all below "m2ray.": what the whole run says of itself, and what is in this part."""
    of_the_part = {
        "site": spec.site,
        "layer": "" if spec.layer is None else str(spec.layer),
        "layer_convention": LAYER_CONVENTION,
        "dtype": ", ".join(column.dtype for column in spec.columns),
        "shape": ", ".join(f"[{column.width}]" for column in spec.columns),
        "byte_order": "little",
        "compression": stored_as(spec, compression),
        "shard": str(shard),
        "attempt": attempt,
    }
    return {
        METADATA_PREFIX + name: value
        for name, value in ({"format_version": str(FORMAT_VERSION)} | dict(run_metadata) | of_the_part).items()
    }


def require_compression(compression: str) -> None:
    """Raise ConfigError unless there is such a compression."""
    if compression not in get_args(Compression):
        raise ConfigError(f"compression = {compression!r} is unknown.", f"It may be: {', '.join(get_args(Compression))}.")


def stored_as(spec: PartSpec, compression: Compression) -> Compression:
    """How parts of this kind are stored under a run's compression: planes only where a column can be split."""
    return compression if any(len(stored_columns(column, compression)) > 1 for column in spec.columns) else "none"


def stored_columns(column: Column, compression: Compression) -> tuple[tuple[str, int], ...]:
    """Name and bytes a row of the Parquet columns that hold a column's values: itself, or its two planes."""
    if compression == "planes" and column.name == "activation" and column.row_bytes == 2 * column.width:
        return ((f"{column.name}_hi", column.width), (f"{column.name}_lo", column.width))
    return ((column.name, column.row_bytes),)


def part_schema(spec: PartSpec, run_metadata: Mapping[str, str], shard: int, attempt: str, compression: Compression = "none") -> Any:
    """The pyarrow schema of one part, footer metadata included.

    Neither Parquet nor Arrow has a bfloat16, and bits labelled as another type would be read as wrong numbers. So a row's
    value in a column is one fixed-size binary value: its `width` elements' raw little-endian bits.
    """
    stored = [each for column in spec.columns for each in stored_columns(column, compression)]
    columns = [pa.field(name, pa.binary(num_bytes), nullable=False) for name, num_bytes in stored]
    return pa.schema([*TOKEN_FIELDS, *columns], metadata=part_metadata(spec, run_metadata, shard, attempt, compression))
