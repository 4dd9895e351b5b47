"""transformers' own model with accelerate's hooks, all layers but the first in host memory: tokens a second, printed as JSON.

    python benchmarks/peers/with_accelerate.py MODEL --sequences 32 --length 512 [--device cpu]

FP8 is dequantised as it is loaded, as nobody's kernels are had from the network. Nothing is captured.
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--sequences", type=int, required=True)
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--passes", type=int, default=2)
options = parser.parse_args()

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else it reads ahead without a bound
config = AutoConfig.from_pretrained(options.model)
if getattr(config, "quantization_config", None):
    config.quantization_config["dequantize"] = True
whole = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.bfloat16, device_map={"": options.device}).eval()
model = whole.model
for layer in model.layers[1:]:
    cpu_offload(layer, execution_device=torch.device(options.device))
token_ids = torch.from_numpy(np.random.default_rng(0).integers(3, 500, (options.sequences, options.length))).to(options.device)


def passes_s(count: int) -> float:
    began = time.monotonic()
    with torch.inference_mode():
        for _ in range(count):
            model(input_ids=token_ids, use_cache=False)
    if options.device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic() - began


passes_s(1)
print(json.dumps({"tokens_per_s": options.passes * token_ids.numel() / passes_s(options.passes)}))
