#!/usr/bin/env bash
# torch: which of equal values topk picks depends on how long the row is, so that padding changes a causal model's rows.
#
# Seen 2026-11-30 with torch 2.13.0, transformers 5.24.0 on Python 3.11, CPU (x86-64).
# Seen: topk(3) of 0 0 1 0 0 0 picks other zeros when 1, 10 or 200 times -inf stand behind them, which topk never picks. A
#   DeepSeek-V3.2 of random weights lets each token attend to the `index_topk` keys of the largest scores, and a score is a sum of
#   rectified products, one a head of its index: with 4 heads many are exactly 0. Rows of a prompt move by 0.6 of their norm when
#   other tokens follow, or padding does; with 16 heads and more not at all.
# One would have guessed: equal values are picked by some rule of their own, the first ones say; and what no key of a causal
#   model may see changes nothing.
# Why it matters: small models of such a kind, made for research, have few index heads. Their activations depend on what else is in
#   the batch, by far more than rounding, and nobody is told. Use prompts of up to `index_topk` tokens, or one prompt a batch.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.4.6
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import DeepseekV32Config, DeepseekV32Model

values = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
chosen = {}
for pad in (0, 1, 10, 200):
    row = torch.cat([values, torch.full((pad,), -torch.inf)])
    chosen[pad] = row.topk(3).indices.sort().values.tolist()
print("topk(3) of 0 0 1 0 0 0, with so many -inf behind it:", chosen)

SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
SPARSE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
moved = {}
for heads in (4, 16, 64):
    torch.manual_seed(0)
    config = DeepseekV32Config(vocab_size=128, num_hidden_layers=3, index_n_heads=heads, index_topk=8, **SIZES, **SPARSE)
    model = DeepseekV32Model(config).eval()
    for tensor in model.parameters():
        tensor.data.add_(torch.randn_like(tensor) * 0.1)
    ids = torch.randint(1, 128, (1, 60))
    with torch.no_grad():
        alone, padded = model(ids).last_hidden_state[0], model(torch.nn.functional.pad(ids, (0, 60))).last_hidden_state[0, :60]
    moved[heads] = ((padded - alone).norm(dim=1) / alone.norm(dim=1)).max().item()
    print(f"DeepSeek-V3.2 with {heads} index heads: rows of 60 tokens move by {moved[heads]:.1g} of their norm when 60 follow")
if len({*map(tuple, chosen.values())}) == 1 or moved[4] < 0.01 or moved[64] > 1e-4:
    sys.exit("The behaviour has changed.")
PYTHON
