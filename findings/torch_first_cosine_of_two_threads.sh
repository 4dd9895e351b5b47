#!/usr/bin/env bash
# torch on CPUs: a process's first cos or sin of 2,048 numbers and more, made by two threads, may have other bits than every later one.
#
# Seen 2026-11-30 with torch 2.13.0+cpu (built with MKL) on Python 3.11, x86-64 with AVX-512, two cores.
# Seen: in 5 of 1,500 fresh processes the first cos() of a rotary embedding [112, 32] in float32 by two threads differed in its last
#   bit from the second cos() of the same tensor in the same process; all later ones, and those of one thread, were equal. Nothing
#   is said. With one call on a single element before it, 2,000 processes showed no difference.
# One would have guessed: the same operation on the same values with the same number of threads gives the same bits, the first time
#   too. But torch hands such functions to MKL's vector mathematics, which looks at the processor in its first call; two threads that
#   make this call at the same time do not both see the result, and one of them computes with other instructions.
# Why it matters: the first forward pass of a process computes the rotary embedding so. Its rows are then not those of any other pass:
#   after rounding to bfloat16 one position's angles differ, and from there on hidden states by up to half of their norm where another
#   expert was chosen. A comparison that is bitwise fails once in some hundred starts, and an extraction that is restarted often holds a
#   few such rows. Call cos on one element before the first pass.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
cd "$work"
timeout 1500 venv/bin/python - <<'PYTHON'
import os
import sys

import torch

torch.set_num_threads(1)
INVERSE = 1 / (5e6 ** (torch.arange(0, 32, 2).float() / 32))
MOST = 6000


def first_differs(is_settled: bool) -> bool:
    """In a process of its own: whether its first cosine by two threads has other bits than its second."""
    child = os.fork()
    if child == 0:
        if is_settled:
            torch.ones(1).cos()
        torch.set_num_threads(2)
        threads_at_work = torch.ones(1 << 18)
        for _ in range(20):  # so that both threads are awake
            threads_at_work.add_(1.0)
        angles = torch.outer(torch.arange(112).float(), INVERSE).repeat(1, 2)
        os._exit(0 if torch.equal(angles.cos(), angles.cos()) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


different = tried = 0
while tried < MOST and different < 2:
    different += first_differs(is_settled=False)
    tried += 1
print(f"the first cosine by two threads differed in {different} of {tried} processes")
settled = sum(first_differs(is_settled=True) for _ in range(tried))
print(f"after a cosine of one element by one thread: in {settled} of {tried}")
sys.exit(0 if different and not settled else 1)
PYTHON
