#!/usr/bin/env bash
# torch.save: a file holds a tensor's memory, not its values, so it may be 32 times too large, or far smaller than the tensor.
#
# Seen 2026-11-29 with torch 2.13.0, numpy 2.4.6 on Python 3.11.
# Seen: the states of one sample of 32, states[7], saved by itself: the file has the bytes of all 32, and the others can be
#   read back out of it. states[7].clone() gives a file of its own size. And a value that is expanded to [1000000, 4096]
#   gives a file of 2 KB, which torch.load(weights_only=True) takes without a word: it says 16 GB of itself.
# One would have guessed: a file has as many bytes as the tensor that was saved, and a file that passes weights_only=True
#   takes about its own size in memory.
# Why it matters: tools that dump hidden states save one sample of a batch, or one layer of a stack: 32 files of 32 samples
#   fill the disk 32 times, and a sample that was left out on purpose is in its neighbour's file. And whoever reads files of
#   strangers is told nothing of memory by weights_only=True: the first .float() or .contiguous() asks for 16 GB. Clone
#   before saving; after loading compare numel() * element_size() with untyped_storage().nbytes().
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import torch

states = torch.randn(32, 64, 256, generator=torch.Generator().manual_seed(0))
torch.save(states[7], "view.pt")
torch.save(states[7].clone(), "clone.pt")
view, clone = Path("view.pt").stat().st_size, Path("clone.pt").stat().st_size
sample = torch.load("view.pt", weights_only=True)
neighbour = torch.empty(0).set_(sample.untyped_storage(), 8 * 64 * 256, (64, 256))
print(f"one sample of {states[7].nbytes:,} bytes: {view:,} as a view, {clone:,} cloned")
print("its neighbour is in the file:", torch.equal(neighbour, states[8]))

torch.save(torch.zeros(1).expand(1_000_000, 4096), "expanded.pt")
small = Path("expanded.pt").stat().st_size
loaded = torch.load("expanded.pt", weights_only=True)
held = loaded.untyped_storage().nbytes()
print(f"a file of {small:,} bytes loads as {list(loaded.shape)}: {loaded.nbytes:,} bytes, of which {held} are there")
if view < 32 * states[7].nbytes or clone > 2 * states[7].nbytes or not torch.equal(neighbour, states[8]) or small > 4096 or held > 4:
    sys.exit("The behaviour has changed.")
PYTHON
