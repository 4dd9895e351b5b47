"""m2ray as it was at commit 6feae92, all layers but the first in host memory: tokens a second through one stage, printed as JSON.

    PYTHONPATH=CHECKOUT python benchmarks/peers/with_m2ray_6feae92.py MODEL --layers 6 --sequences 32 --length 512 [--device cpu]

CHECKOUT holds that commit's folder `m2ray` (git archive 6feae92 m2ray | tar -x -C CHECKOUT). Compiled on a GPU, a micro-batch at a time, nothing captured.
"""

import argparse
import json
import time

import numpy as np
import torch
from m2ray.model.offload import Offload

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.stage import StageSpec, load_stage

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--layers", type=int, required=True)
parser.add_argument("--sequences", type=int, required=True)
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--passes", type=int, default=6)
options = parser.parse_args()

on_gpu = options.device != "cpu"
shape = (options.sequences, options.length)
spec = StageSpec(
    options.model,
    LayerSpan(0, options.layers),
    (),
    ("residual",),
    "bfloat16",
    "bfloat16",
    "auto",
    options.device,
    None,
    compile=on_gpu,
    offload=Offload(in_host=tuple(range(1, options.layers))),
)
stage = load_stage(spec, lambda *_: None)
token_ids = np.random.default_rng(0).integers(3, 500, shape).astype(np.int32)
micro_batch = MicroBatch(0, 0, True, np.arange(shape[0]), np.full(shape[0], shape[1], np.int32), token_ids)


def passes_s(count: int) -> float:
    began = time.monotonic()
    for _ in range(count):
        _ = stage.forward(micro_batch, None).captured
    if on_gpu:
        torch.cuda.synchronize()
    return time.monotonic() - began


passes_s(2)
print(json.dumps({"tokens_per_s": options.passes * shape[0] * shape[1] / passes_s(options.passes)}))
