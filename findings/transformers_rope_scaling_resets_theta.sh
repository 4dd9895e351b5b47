#!/usr/bin/env bash
# transformers: a rope_scaling line added to config.json sets theta back to 10,000 if rope_parameters held it.
#
# Seen 2026-11-29 with transformers 5.24.0 on Python 3.11.
# Seen: transformers 5 writes {"rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"}}. With the line
#   "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ...} added, the loaded configuration has the yarn values and
#   rope_theta 10000.0. The old key replaces the new one whole, and nothing about it is logged.
# One would have guessed: the two are merged, so theta stays 5,000,000, or the contradiction is refused.
# Why it matters: model cards of the years before say "add this rope_scaling line to config.json for long prompts". That
#   was right while theta had a key of its own beside it. In a checkpoint saved by transformers 5 the same edit gives
#   every position other angles. The model still writes text, so the activations look sound and are not the model's.
#   Put the scaling inside rope_parameters, and print config.rope_parameters before a long run.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - 2>stderr <<'PYTHON' || { cat stderr >&2; exit 1; }
import json
import sys
from pathlib import Path

from transformers import AutoConfig, Qwen3Config

Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 5e6}).save_pretrained("model")
file = Path("model/config.json")
written = json.loads(file.read_text())
before = AutoConfig.from_pretrained("model").rope_parameters
print("as saved          ", before)

scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
file.write_text(json.dumps(written | {"rope_scaling": scaling}))
after = AutoConfig.from_pretrained("model").rope_parameters
print("with rope_scaling ", after)

if (before["rope_theta"], after["rope_theta"], after["factor"]) != (5e6, 1e4, 4.0):
    sys.exit("The behaviour has changed.")
PYTHON
if grep -i rope stderr; then
    echo "The behaviour has changed: there is a word about it."
    exit 1
fi
