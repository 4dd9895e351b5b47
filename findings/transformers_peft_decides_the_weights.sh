#!/usr/bin/env bash
# transformers: whether peft is installed decides which model the same from_pretrained gives of the same folder.
#
# Seen 2026-11-30 with transformers 5.24.0, peft 0.21.2, accelerate 1.15.0, torch 2.13.0 on Python 3.11.
# Seen: a folder with a whole model (config.json, model.safetensors) and, saved into it later, an adapter (adapter_config.json,
#   adapter_model.safetensors). Where peft is installed, AutoModelForCausalLM.from_pretrained(FOLDER) puts the adapter on the
#   model and switches it on; where it is not, the adapter is left out. The class is LlamaForCausalLM both times, and not a
#   word is logged either way; at level INFO one line names the adapter's file.
# One would have guessed: a missing package is an error, or a warning, where it changes what the model computes.
# Why it matters: activations from two machines, or from one before and after a `pip install` of something that brings peft, are
#   of two models. Ask model._hf_peft_config_loaded, keep adapters in folders of their own, or merge them (merge_and_unload).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
"$work/venv/bin/pip" install --quiet --no-deps --target "$work/added" peft==0.21.2
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

PYTHONPATH="$work/added" venv/bin/python - <<'PYTHON'
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES))
model.save_pretrained("model")
get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).save_pretrained("model")
print("the folder:", sorted(path.name for path in Path("model").glob("*.*s*n*")))
PYTHON

cat > load.py <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
with torch.no_grad():
    hidden = model(torch.tensor([[1, 5, 9, 20]]), output_hidden_states=True).hidden_states[1]
print(f"{type(model).__name__}, norm of the states after layer 0: {hidden.norm():.4f}")
PYTHON
without=$(venv/bin/python load.py 2> without.log)
with=$(PYTHONPATH="$work/added" venv/bin/python load.py 2> with.log)
echo "without peft: $without"
echo "with peft:    $with"
if [[ $without == "$with" ]] || grep -qi "adapter\|peft\|lora" without.log with.log; then
    grep -hi "adapter\|peft\|lora" without.log with.log || true
    echo "The behaviour has changed."
    exit 1
fi
