#!/usr/bin/env bash
# safetensors: a packed FP4 tensor can be read whole, but no slice of it, and the header gives it another shape.
#
# Seen 2026-11-29 with safetensors 0.8.0, torch 2.13.0, numpy 2.4.6 on Python 3.11.
# Seen: torch.float4_e2m1fn_x2 [4, 8] (two values in each byte) is written with dtype F4 and shape [4, 16]. get_tensor
#   gives [4, 8] back. get_slice(...)[0:2] and even [:] raise
#   RuntimeError: shape '[4, 16]' is invalid for input of size 32.
# One would have guessed: what get_tensor reads, get_slice reads too, and tensor.shape equals the shape in the header.
# Why it matters: a stage that loads its own part of a large FP4 checkpoint (one expert of many, one rank's rows) reads
#   slices, and code that plans from headers compares shapes. Both must know that F4 counts values where torch counts
#   pairs. Read whole tensors, or take the bytes at data_offsets yourself: 32 of them here.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

packed = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
save_file({"weight": packed.view(torch.float4_e2m1fn_x2)}, "fp4.safetensors")

raw = Path("fp4.safetensors").read_bytes()
entry = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["weight"]
print("header    ", entry)
with safe_open("fp4.safetensors", framework="pt") as file:
    whole = file.get_tensor("weight")
    print("get_tensor", whole.dtype, list(whole.shape), "same bytes:", torch.equal(whole.view(torch.uint8), packed))
    try:
        part = file.get_slice("weight")[0:2]
        answer = f"{part.dtype} {list(part.shape)}"
    except RuntimeError as error:
        answer = f"RuntimeError: {error}"
    print("get_slice ", answer)
if (entry["dtype"], entry["shape"], list(whole.shape)) != ("F4", [4, 16], [4, 8]) or "is invalid for input" not in answer:
    sys.exit("The behaviour has changed.")
PYTHON
