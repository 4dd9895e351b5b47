#!/usr/bin/env bash
# torch on CPUs: a linear layer in bfloat16 or float16 gives other bits where its weight wants a gradient, also within no_grad and inference_mode.
#
# Seen 2026-11-30 with torch 2.13.0+cpu on Python 3.11, x86-64 with AVX-512, two cores.
# Seen: activations [4, 64, 1536] that are a transposed view times a weight [768, 1536], no bias: between the same weight with
#   requires_grad=True and with False 35 of 196,608 elements differ in bfloat16 and 461 in float16, each by a rounding; none in
#   float32. Activations that lie row by row give the same bits with both.
# One would have guessed: nothing is differentiated in inference_mode, so whether a weight wants a gradient changes no number. But
#   torch.matmul asks just that before it chooses between one product of all rows, for which it copies the view, and one product a
#   sequence; the two round differently.
# Why it matters: `from_pretrained` leaves all weights wanting gradients, and who serves or saves a model often calls
#   requires_grad_(False). The hidden states of Mamba and Jamba, whose scan comes out transposed, are then not the same bits, and a bitwise
#   comparison of two programs that load the same files fails without any fault in either.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
cd "$work"
timeout 600 venv/bin/python - <<'PYTHON'
import sys

import torch
from torch.nn import Parameter
from torch.nn.functional import linear

torch.manual_seed(0)
differing = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    view = torch.randn(4, 1536, 64).to(dtype).transpose(1, 2)
    weight = (torch.randn(768, 1536) / 1536**0.5).to(dtype)
    wants, wants_not = Parameter(weight), Parameter(weight, requires_grad=False)
    with torch.inference_mode():
        differing[dtype] = int((linear(view, wants) != linear(view, wants_not)).sum())
        in_rows = int((linear(view.contiguous(), wants) != linear(view.contiguous(), wants_not)).sum())
    print(f"{dtype}: {differing[dtype]} of {4 * 64 * 768:,} elements differ; {in_rows} where the activations lie row by row")
sys.exit(0 if differing[torch.bfloat16] and differing[torch.float16] else "No element differs any more.")
PYTHON
