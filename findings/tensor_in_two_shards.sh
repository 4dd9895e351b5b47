#!/usr/bin/env bash
# transformers and huggingface_hub: the index says which shard a tensor is in; both take the shard that was read last.
#
# Seen 2026-11-29 with transformers 5.24.0, huggingface_hub 2.4.0, torch 2.13.0 on Python 3.11.
# Seen: a tensor stands in two files, and weight_map points to one of them. from_pretrained reads the files in the order
#   of their names and keeps the last value: a patch in "fix.safetensors" before "model-00001..." is lost, the same patch
#   in "patch.safetensors" counts. load_torch_model reads them in the order of a Python set: of a few processes some
#   give one value and some the other, for the same folder. No missing or unexpected key is reported, and nothing is logged.
# One would have guessed: weight_map decides, that is what it is for.
# Why it matters: one new small shard and a changed weight_map is the cheap way to replace a tensor of a checkpoint of
#   hundreds of GB. It may silently not count, or count on every second run. Activations then come from a model
#   that nobody meant, and two runs of one job differ. Take the old tensor out of its shard, or load and compare it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 huggingface_hub==2.4.0 torch==2.13.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

NORM, MAIN = "model.norm.weight", "model-00001-of-00001.safetensors"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
seen = {}
for patch in ("fix.safetensors", "patch.safetensors"):
    folder = Path(patch).stem
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES)).save_pretrained(folder)
    Path(folder, "model.safetensors").rename(Path(folder, MAIN))
    names = load_file(f"{folder}/{MAIN}")
    save_file({NORM: torch.full_like(names[NORM], 5)}, f"{folder}/{patch}", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, MAIN) | {NORM: patch}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    seen[patch] = LlamaForCausalLM.from_pretrained(folder).model.norm.weight[0].item()
    print(f"from_pretrained, {patch}: {seen[patch]} (the index says 5.0)")
if seen != {"fix.safetensors": 1.0, "patch.safetensors": 5.0}:
    sys.exit("The behaviour has changed.")
PYTHON

values=""
for seed in {1..16}; do # the order of a set of strings follows this seed; without it Python takes one by chance
    values+=$(PYTHONHASHSEED=$seed venv/bin/python - <<'PYTHON'
from huggingface_hub import load_torch_model
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig.from_pretrained("patch"))
load_torch_model(model, "patch")
print(model.model.norm.weight[0].item(), end=" ")
PYTHON
    )" "
    if [[ $values == *1.0* && $values == *5.0* ]]; then
        echo "load_torch_model, one process each: $values"
        exit 0
    fi
done
echo "The behaviour has changed: load_torch_model gave $values"
exit 1
