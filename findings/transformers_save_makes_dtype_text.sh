#!/usr/bin/env bash
# transformers: save_pretrained changes the model that it saves: config.dtype, a torch.dtype before, is a string afterwards.
#
# Seen 2026-11-29 with transformers 5.24.0, torch 2.13.0, numpy 2.4.6 on Python 3.11 (5.14.1 does the same).
# Seen: a model loaded with dtype=torch.bfloat16 has config.dtype = torch.bfloat16. After model.save_pretrained(folder) the
#   same object's config.dtype is the text 'bfloat16', and torch.finfo(model.config.dtype) raises TypeError. model.dtype
#   stays torch.bfloat16.
# One would have guessed: saving a model leaves the model as it is.
# Why it matters: code that asks the configuration for its dtype (masks filled with finfo(dtype).min, buffers made with
#   dtype=config.dtype) works until the first checkpoint is saved, and fails in the step after it. nvidia-modelopt 0.47's
#   EAGLE-3 does so: TypeError: finfo(): argument 'type' (position 1) must be torch.dtype, not str. Ask model.dtype instead.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **SIZES)).save_pretrained("model")

model = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
before = model.config.dtype
model.save_pretrained("again")
after = model.config.dtype
print(f"config.dtype before: {before!r}, after: {after!r}; model.dtype: {model.dtype!r}")
try:
    answer = str(torch.finfo(after).min)
except TypeError as error:
    answer = f"TypeError: {error}"
print("torch.finfo(model.config.dtype).min:", answer)
if before != torch.bfloat16 or after != "bfloat16" or model.dtype != torch.bfloat16 or not answer.startswith("TypeError"):
    sys.exit("The behaviour has changed.")
PYTHON
