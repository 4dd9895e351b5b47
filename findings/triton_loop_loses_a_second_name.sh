#!/usr/bin/env bash
# triton: a variable that begins a loop as another variable's value does not change in the loop, whatever is assigned to it there.
#
# Seen 2026-11-30 with triton 3.8.0 (3.6.0 does the same) on Python 3.11, compiled for an H200, no GPU needed.
# Seen: `last = new` before a loop whose body says `last = new; new = new + 1` compiles to code that stores what `new` was before
#   the loop, in `for` and in `while`. With `last = new + 0` before the loop the same body stores the last turn's, as Python does.
# One would have guessed: a kernel means what its text means in Python. No warning or error says otherwise, and with
#   TRITON_INTERPRET=1 the text runs as Python.
# Why it matters: "bring the next tile while this one is multiplied" is written just so, and a kernel of attention or of
#   experts' products then goes on with the first tile: numbers of the right size that are wrong. Hold kernels against their
#   twin on a GPU, over loops of several turns; in the interpreter alone nothing is seen.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet triton==3.8.0
cat >"$work/kernels.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def by_for(numbers, turns):
    new = tl.load(numbers)
    last = new
    for _ in range(turns):
        last = new
        new = new + 1
    tl.store(numbers + 1, last)


@triton.jit
def by_while(numbers, turns):
    new = tl.load(numbers)
    last = new
    turn = 0
    while turn < turns:
        last = new
        new = new + 1
        turn += 1
    tl.store(numbers + 1, last)


@triton.jit
def with_a_sum(numbers, turns):
    new = tl.load(numbers)
    last = new + 0
    for _ in range(turns):
        last = new
        new = new + 1
    tl.store(numbers + 1, last)


def stores_what_was_loaded(kernel):
    """Whether what is stored behind the loop is the very value that was loaded before it."""
    source = ASTSource(kernel, {"numbers": "*i32", "turns": "i32"}, {})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    (loaded,) = re.findall(r"(%\S+) = tt\.load", text)
    (stored,) = re.findall(r"tt\.store %[^,]+, (%\S+)", text)
    return loaded == stored


found = {kernel.fn.__name__: stores_what_was_loaded(kernel) for kernel in (by_for, by_while, with_a_sum)}
for name, is_first in found.items():
    print(f"{name}: stores {'the value from before the loop' if is_first else 'what the last turn gave it'}")
if found != {"by_for": True, "by_while": True, "with_a_sum": False}:
    sys.exit("The behaviour has changed.")
PYTHON
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/kernels.py"
