#!/usr/bin/env bash
# transformers: experts in compressed-tensors' NVFP4 are dequantised without their global scale.
#
# Seen 2026-11-29 with transformers 5.24.0, compressed-tensors 0.20.1, torch 2.13.0 on Python 3.11.
# Seen: a tiny Qwen3-MoE whose linear layers compressed-tensors itself packed as nvfp4-pack-quantized, loaded with dequantize=True.
#   Attention comes back as it was packed, within FP4's coarseness. Every expert comes back larger by its weight_global_scale,
#   here 34,911 times. No key is reported as missing or unexpected, nothing is logged.
# One would have guessed: a checkpoint that loads without a word has its weights, those of experts as those of attention.
#   For stacked experts transformers (integrations/compressed_tensors.py) hands the library weight_packed, weight_scale and
#   weight_shape alone, and compressed-tensors takes an absent global scale for none.
# Why it matters: the model runs, and its activations are those of another model. Hold one expert's norm against attention's.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 compressed-tensors==0.20.1 accelerate==1.15.0 torch==2.13.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads), dtype=torch.bfloat16)
model.save_pretrained("plain")
plain = load_file("plain/model.safetensors")

args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
packer = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
packed = {}
for name, weight in plain.items():
    if "_proj.weight" not in name:
        packed[name] = weight
        continue
    groups = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    divisor = (448 * 6 / weight.float().abs().max()).reshape(1)
    scale = (groups / 6 * divisor).to(torch.float8_e4m3fn).float()
    parts = packer.compress({"weight": weight, "weight_scale": scale, "weight_global_scale": divisor}, scheme)
    packed |= {name.replace("weight", end): tensor.contiguous() for end, tensor in parts.items()}
Path("packed").mkdir()
save_file(packed, "packed/model.safetensors", metadata={"format": "pt"})
fields = json.loads(Path("plain/config.json").read_text())
group = {"targets": ["Linear"], "weights": args, "format": "nvfp4-pack-quantized"}
fields["quantization_config"] = {
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "nvfp4-pack-quantized",
    "ignore": ["lm_head", "re:.*mlp.gate$"], "config_groups": {"group_0": group},
}
Path("packed/config.json").write_text(json.dumps(fields))

loaded, info = AutoModelForCausalLM.from_pretrained(
    "packed", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True
)
print("missing", info["missing_keys"], "unexpected", info["unexpected_keys"])
ratios = {}
for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"):
    ratios[name] = (loaded.state_dict()[name].float().norm() / model.state_dict()[name].float().norm()).item()
    print(f"{name}: norm {ratios[name]:.3f} times what it was")
attention, experts = ratios.values()
if info["missing_keys"] or info["unexpected_keys"] or not 0.9 < attention < 1.1 or experts < 100:
    sys.exit("The behaviour has changed.")
PYTHON
