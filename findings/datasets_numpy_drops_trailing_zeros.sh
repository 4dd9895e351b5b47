#!/usr/bin/env bash
# datasets: the formats "numpy" and "torch" cut zero bytes off the end of a binary value.
#
# Seen 2026-11-29 with datasets 5.2.0, pyarrow 26.0.1, numpy 2.4.6 on Python 3.11.
# Seen: a column of fixed_size_binary[4], four rows. Format "numpy" gives lengths 4, 2, 0, 4, no format and format
#   "arrow" give 4, 4, 4, 4. "torch" gave the same short rows as "numpy" (it hands over bytes, not tensors). Nothing is
#   logged. The column becomes a numpy array of dtype S4, and numpy drops an S value's trailing zero bytes on access.
# One would have guessed: the type says 4 bytes, so each row has 4 bytes in every format.
# Why it matters: activations are often stored as raw bytes, one row a token. A row whose last bfloat16 or float32 is 0.0
#   (dead features, padding, ReLU outputs) comes back short. At best frombuffer or reshape fails, on one row of
#   thousands; rows that are joined shift all that come after them. Use format "arrow" for such columns.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

rows = [b"\x01\x02\x03\x04", b"\x01\x02\x00\x00", b"\x00\x00\x00\x00", b"\x00\x01\x00\x02"]
pq.write_table(pa.table({"activation": pa.array(rows, pa.binary(4))}), "rows.parquet")
dataset = Dataset.from_parquet("rows.parquet")
print("type  ", dataset.features["activation"])

plain = [len(value) for value in dataset[:]["activation"]]
arrow = [len(value.as_py()) for value in dataset.with_format("arrow")[:]["activation"]]
as_numpy = [len(bytes(value)) for value in dataset.with_format("numpy")[:]["activation"]]
print("plain ", plain)
print("arrow ", arrow)
print("numpy ", as_numpy)
if (plain, arrow, as_numpy) != ([4, 4, 4, 4], [4, 4, 4, 4], [4, 2, 0, 4]):
    sys.exit("The behaviour has changed.")
PYTHON
