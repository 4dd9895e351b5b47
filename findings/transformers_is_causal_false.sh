#!/usr/bin/env bash
# transformers: "is_causal": false in config.json makes a LlamaForCausalLM look at later tokens, and at the padding.
#
# Seen 2026-11-29 with transformers 5.24.0, torch 2.13.0 on Python 3.11, CPU, float32.
# Seen: three tokens alone, and the same three padded on the right beside a prompt of five, without an attention mask.
#   As saved the three rows agree within 1e-5. With "is_causal": false added they differ by 0.1 to 1 (LlamaConfig has no
#   such field). With the attention mask the rows agree again, but each row still depends on the tokens after it.
#   Nothing is logged.
# One would have guessed: a class named ...ForCausalLM is causal, and an unknown key of config.json has no effect.
# Why it matters: right padding without a mask is exact for a causal model and fast, so extraction code relies on it.
#   Embedding models publish exactly this key in a decoder's configuration. Their rows then change with what else is in
#   the batch, and a prefix's rows with what follows it, which breaks prefix caches too. Look for the key first.
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
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES)).save_pretrained("model")
alone = torch.tensor([[5, 6, 7]])
batch = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])
mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@torch.no_grad()
def differences() -> list[float]:
    """How far the rows of [5, 6, 7] move: padded, padded with a mask; and those of [5, 6] when 7 becomes 9."""
    model = LlamaForCausalLM.from_pretrained("model").eval().model
    rows = model(alone).last_hidden_state[0]
    padded = model(batch).last_hidden_state[0, :3]
    masked = model(batch, attention_mask=mask).last_hidden_state[0, :3]
    changed = model(torch.tensor([[5, 6, 9]])).last_hidden_state[0, :2]
    return [(a - b).abs().max().item() for a, b in ((rows, padded), (rows, masked), (rows[:2], changed))]


before = differences()
file = Path("model/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": False}))
after = differences()
for name, *pair in zip(("padded", "padded, with a mask", "a later token changed"), before, after, strict=True):
    print(f"{name:22} as saved {pair[0]:.1e}   with is_causal false {pair[1]:.1e}")
if max(before) > 1e-5 or [value > 1e-2 for value in after] != [True, False, True]:
    sys.exit("The behaviour has changed.")
PYTHON
