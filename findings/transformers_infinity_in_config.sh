#!/usr/bin/env bash
# transformers: save_pretrained writes an infinite number as {"__float__": "Infinity"} into config.json.
#
# Seen 2026-11-29 with transformers 5.24.0 on Python 3.11.
# Seen: Mamba2Config has time_step_limit (0.0, inf) from the start. In the saved config.json it is
#   [0.0, {"__float__": "Infinity"}]. transformers reads that back as inf; json.load gives the object as it stands.
# One would have guessed: Infinity, which Python's json writes and reads, or a large number. JSON itself has no infinity,
#   so something had to be chosen; the choice is transformers' own.
# Why it matters: planners, converters, servers and extraction tools read config.json without transformers. They meet an
#   object where a number was announced: a comparison raises TypeError, a schema refuses the file. Hybrids with Mamba2
#   layers carry this field, and so do files that were only loaded and saved again. Decode the object before you check types.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import math
import sys
from pathlib import Path

from transformers import AutoConfig, Mamba2Config

Mamba2Config().save_pretrained("model")
plain = json.loads(Path("model/config.json").read_text())["time_step_limit"]
own = AutoConfig.from_pretrained("model").time_step_limit
print("json.load   ", plain)
print("transformers", own)
if plain != [0.0, {"__float__": "Infinity"}] or not math.isinf(own[1]):
    sys.exit("The behaviour has changed.")
PYTHON
