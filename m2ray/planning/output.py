"""What a run writes: bytes and files by part, what they cost, and how fast the store must take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m2ray.batches import Column, PartSpec, PromptStats

IDS_BYTES_A_ROW = 4.5
"""sequence_id, position and token_id of one row. 16 bytes in memory; encoded between 3.4 (tokens as frequent as in
natural text) and 6.7 (all token ids equally frequent), as measured on parts of the writer with the headers of their pages, whose CRC the footer repeats."""

FEW_ROWS = 256
IDS_BYTES_OF_FEW = 4
"""Of the first rows of a row group: their token ids have not come yet. Of chosen tokens a row group may have no others."""

IDS_BYTES_A_SEQUENCE = 8
"""Its id."""

PLANES_SHARE: Mapping[str, float] = {"bfloat16": 0.71, "float16": 0.87}
"""The share of a row's bytes that planes take. It depends on the rows: 0.66 to 0.75 and 0.84 to 0.93 were seen, and the values here are
those of rows whose elements' scales differ as widely as those of a residual stream (log-normal, sigma 1)."""

BYTES_A_ROW_GROUP = 585
"""Page headers, dictionaries' headers and the footer's entry: measured. A micro-batch is one row group."""

BYTES_A_FURTHER_COLUMN = 125
"""Of a row group: where a site has several columns."""

BYTES_A_PART = 2_300
"""Schema, metadata and magic: measured."""

RECORD_BYTES_A_PART = 300
"""A part's entries in its commit and in the manifest."""

RECORD_BYTES_A_SEQUENCE = 80
"""A row of `sequences/`."""


@dataclass(frozen=True)
class OutputPlan:
    """What the run folder will hold.

    Attributes:
        by_part: bytes of all parts of each site and layer; each has a file a shard.
        files, num_bytes: of all parts.
        rows: in each site and layer.
        statistics_bytes: of `statistics/`, at most.
        saved_bytes: what the rows of all other tokens would take besides.
        disk_bytes: parts, records and statistics, those of all shards among them: what the disk or bucket needs.
        cost_a_month: of `disk_bytes` at the stated price per GB (10^9 bytes) and month; None where none was stated.
    """

    by_part: Mapping[PartSpec, int]
    files: int
    num_bytes: int
    rows: int
    statistics_bytes: int
    saved_bytes: int
    disk_bytes: int
    cost_a_month: float | None


def stored_row_bytes(spec: PartSpec, compression: str) -> float:
    """Bytes of one row in a part, its ids among them; exact but for the ids without compression, an estimate with planes."""
    return sum(column.row_bytes * _share(column, compression) for column in spec.columns) + IDS_BYTES_A_ROW


def _share(column: Column, compression: str) -> float:
    """What a column takes of its bytes: planes are made of activations of 16 bits."""
    return PLANES_SHARE.get(column.dtype, 1.0) if compression == "planes" and column.name == "activation" else 1.0


def part_bytes(spec: PartSpec, rows: int, row_groups: int, files: int = 1, compression: str = "none", sequences: int = 0) -> int:
    """Bytes of `files` parts with these rows and row groups together, within 2 % of what the writer makes of 128 bytes a row.

    `sequences`: of which tokens were chosen; 0 where every token has a row.
    """
    of_few = IDS_BYTES_OF_FEW * min(rows, FEW_ROWS * row_groups) + IDS_BYTES_A_SEQUENCE * min(rows, sequences) if sequences else 0
    of_a_group = BYTES_A_ROW_GROUP + BYTES_A_FURTHER_COLUMN * (len(spec.columns) - 1)
    return round(rows * stored_row_bytes(spec, compression)) + of_few + row_groups * of_a_group + files * BYTES_A_PART


def plan_output(
    parts: Sequence[PartSpec],
    prompts: PromptStats,
    price_per_gb_month: float | None,
    compression: str = "none",
    statistics_bytes: int = 0,
    of_shards_bytes: int = 0,
) -> OutputPlan:
    """The output of these parts, and of statistics with what shards leave for them, for these prompts."""
    rows = prompts.tokens if prompts.rows is None else prompts.rows
    row_groups, of_sequences = min(rows, prompts.micro_batches), prompts.sequences if rows < prompts.tokens else 0
    by_part = {spec: part_bytes(spec, rows, row_groups, prompts.shards, compression, of_sequences) for spec in parts}
    num_bytes, files = sum(by_part.values()), len(parts) * prompts.shards
    disk_bytes = num_bytes + statistics_bytes + of_shards_bytes + files * RECORD_BYTES_A_PART + prompts.sequences * RECORD_BYTES_A_SEQUENCE
    return OutputPlan(
        by_part=by_part,
        files=files,
        num_bytes=num_bytes,
        rows=rows,
        statistics_bytes=statistics_bytes,
        saved_bytes=saved_bytes(parts, prompts.tokens, rows, compression),
        disk_bytes=disk_bytes,
        cost_a_month=None if price_per_gb_month is None else disk_bytes / 1e9 * price_per_gb_month,
    )


def saved_bytes(parts: Sequence[PartSpec], tokens: int, rows: int, compression: str = "none") -> int:
    """What the rows of the tokens that have none would take."""
    return round((tokens - rows) * sum(stored_row_bytes(part, compression) for part in parts))
