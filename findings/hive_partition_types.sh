#!/usr/bin/env bash
# Parquet readers: a folder "layer=07" is a number in pyarrow and polars, and text in DuckDB.
#
# Seen 2026-11-29 with pyarrow 26.0.1, polars 2.1.0, duckdb 2.0.1 on Python 3.11.
# Seen: for folders layer=07 and layer=12 pyarrow gives int32 7 and 12, polars Int64 7 and 12, DuckDB VARCHAR '07' and
#   '12'. For folders layer=7 and layer=12 DuckDB gives BIGINT. With the padded names DuckDB's layer = '7' finds no row,
#   and layer < 10 is refused because text and a number cannot be compared.
# One would have guessed: one folder name, one type, or at least that a leading zero does not turn a number into text.
# Why it matters: layers are the usual partition of an activation store, and zeros in front make the listing sort well.
#   A query that was tried in one reader finds nothing or fails in another, and values kept from DuckDB ('07') do not
#   match those kept from pyarrow (7). Name the type when you read (hive_types = {'layer': 'INT'}), or do not pad.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1 polars==2.1.0 duckdb==2.0.1
cd "$work"
venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

for store, names in {"padded": ("07", "12"), "plain": ("7", "12")}.items():
    for name in names:
        folder = Path(store, f"layer={name}")
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"row": [int(name)]}), folder / "part.parquet")


def in_duckdb(store: str) -> list[tuple]:
    return duckdb.sql(f"SELECT layer, typeof(layer) FROM '{store}/*/*.parquet' ORDER BY row").fetchall()


table = pads.dataset("padded", partitioning="hive").to_table().sort_by("row")
frame = pl.scan_parquet("padded", hive_partitioning=True).collect().sort("row")
found = len(duckdb.sql("SELECT * FROM 'padded/*/*.parquet' WHERE layer = '7'").fetchall())
seen = {
    "pyarrow": (str(table.schema.field("layer").type), table["layer"].to_pylist()),
    "polars": (str(frame.schema["layer"]), frame["layer"].to_list()),
    "duckdb": in_duckdb("padded"),
    "duckdb, not padded": in_duckdb("plain"),
    "duckdb, rows of layer = '7'": found,
}
for reader, what in seen.items():
    print(f"{reader}: {what}")
if list(seen.values()) != [
    ("int32", [7, 12]),
    ("Int64", [7, 12]),
    [("07", "VARCHAR"), ("12", "VARCHAR")],
    [(7, "BIGINT"), (12, "BIGINT")],
    0,
]:
    sys.exit("The behaviour has changed.")
PYTHON
