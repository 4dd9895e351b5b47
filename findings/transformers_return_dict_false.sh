#!/usr/bin/env bash
# transformers: "return_dict": false in config.json leaves a LlamaForCausalLM that cannot be called at all.
#
# Seen 2026-11-30 with transformers 5.24.0, torch 2.13.0 on Python 3.11, CPU.
# Seen: LlamaModel (AutoModel) from that folder gives a tuple, as the field asks. LlamaForCausalLM from the same folder raises
#   AttributeError ('tuple' object has no attribute 'last_hidden_state') in its forward pass: also where return_dict=True is
#   given to the call, and in generate(). Loading says nothing.
# One would have guessed: the causal model gives a tuple too, as its signature says, or the call's own argument wins.
# Why it matters: the field is old and documented, and configurations saved with it are still read. Whoever takes the decoder
#   alone (hooks, extraction, serving) runs such a checkpoint and must expect a tuple; whoever loads the causal model to hold
#   rows against it gets an error that names neither the field nor the file. Set config.return_dict = True after loading.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained("model")
config = Path("model/config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"return_dict": False}))

ids = torch.arange(5)[None]
print("AutoModel:", type(AutoModel.from_pretrained("model")(ids)).__name__)
model = AutoModelForCausalLM.from_pretrained("model")
calls = {
    "forward": lambda: model(ids),
    "forward, return_dict=True": lambda: model(ids, return_dict=True),
    "generate": lambda: model.generate(ids, max_new_tokens=1),
}
seen = {}
for name, call in calls.items():
    try:
        seen[name] = type(call()).__name__
    except AttributeError as error:
        seen[name] = f"AttributeError: {error}"
    print(f"AutoModelForCausalLM, {name}: {seen[name]}")
model.config.return_dict = True
repaired = type(model(ids)).__name__
print("the same with config.return_dict = True:", repaired)
if repaired != "CausalLMOutputWithPast" or any("last_hidden_state" not in each for each in seen.values()):
    sys.exit("The behaviour has changed.")
PYTHON
