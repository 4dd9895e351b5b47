#!/usr/bin/env bash
# transformers: save_pretrained over a sharded checkpoint removes the old shards and leaves their index.
#
# Seen 2026-11-29 with transformers 5.24.0, huggingface_hub 2.4.0, torch 2.13.0 on Python 3.11.
# Seen: a model saved with max_shard_size="10KB" into a folder (4 shards and an index), then again without it. There is
#   model.safetensors now, the 4 shards are gone, and model.safetensors.index.json still names them. from_pretrained
#   takes the single file. huggingface_hub's load_torch_model looks at the index first: FileNotFoundError for a shard.
# One would have guessed: an index goes with its shards, as the shards themselves went.
# Why it matters: a checkpoint that is cut, merged or cast in place passes from many files to one. Tools that start at
#   the index call the folder incomplete ("copy the missing file") though all weights are there. Remove the index when a
#   folder goes from shards to one file, or save into an empty folder.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 huggingface_hub==2.4.0 torch==2.13.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

from huggingface_hub import load_torch_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES))
model.save_pretrained("model", max_shard_size="10KB")
shards = sorted(path.name for path in Path("model").glob("model-*"))
print("saved in shards  ", shards)

model.save_pretrained("model")
files = sorted(path.name for path in Path("model").glob("model*"))
print("saved again      ", files)
named = set(json.loads(Path("model/model.safetensors.index.json").read_text())["weight_map"].values())
print("named by the index and not there:", len([name for name in named if name not in files]))

LlamaForCausalLM.from_pretrained("model")
print("from_pretrained   reads it")
try:
    load_torch_model(model, "model")
    answer = "reads it"
except FileNotFoundError as error:
    answer = f"FileNotFoundError: {error}"
print("load_torch_model ", answer)
if files != ["model.safetensors", "model.safetensors.index.json"] or not answer.startswith("FileNotFound"):
    sys.exit("The behaviour has changed.")
PYTHON
