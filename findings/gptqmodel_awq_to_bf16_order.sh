#!/usr/bin/env bash
# gptqmodel: its converter to BF16 leaves AWQ's weights in AWQ's order, so every eight output features change places.
#
# Seen 2026-11-29 with gptqmodel 7.7.0, autoawq 0.2.9, torch 2.13.0 on Python 3.11 (gptqmodel asks for torch 2.14.1; what is shown is plain torch).
# Seen: of weights that autoawq's own rule packs, autoawq's dequantisation gives the matrix back, and gptqmodel's `dequantize_model` a matrix
#   whose rows are 0, 2, 4, 6, 1, 3, 5, 7 of every eight. It ends without a word, and the BF16 checkpoint loads.
# One would have guessed: a converter from a format to BF16 undoes all of the format. AWQ packs eight output features into a word in the order
#   0, 2, 4, 6, 1, 3, 5, 7; gptqmodel/utils/model_dequant.py (convert_awq_file) unpacks them as if it were 0, 1, 2 ...
# Why it matters: heads and hidden units are mixed up, and the model's outputs are noise, or, between layers whose features are mixed alike,
#   nearly plausible. Dequantise AWQ by autoawq's `dequantize_gemm`, or convert it by compressed-tensors' AutoAWQConverter.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 accelerate==1.15.0 transformers==5.24.0 datasets==5.2.0 \
    device-smi==0.5.7 logbar==0.4.15 pillow==13.0.0 protobuf==7.36.2 pypcre==0.6.4 requests==2.34.2 threadpoolctl==3.7.0 tokenicer==0.0.14
"$work/venv/bin/pip" install --quiet --no-deps gptqmodel==7.7.0 defuser==0.0.28
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" autoawq==0.2.9
tar -xzf "$work/autoawq-0.2.9.tar.gz" -C "$work"
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

awq = runpy.run_path("autoawq-0.2.9/awq/utils/packing_utils.py")  # one file of plain torch: the package itself wants a transformers of 2025
torch.manual_seed(0)
rows, columns, group = 16, 32, 32
numbers, zeros = torch.randint(0, 16, (columns, rows)), torch.full((1, rows), 8)
scales = torch.full((1, rows), 0.5).half()  # alike, for their order stays: it is the numbers that change places


def pack(values):
    words = torch.zeros(len(values), rows // 8, dtype=torch.int64)
    for place, feature in enumerate(awq["AWQ_ORDER"]):
        words |= values[:, feature::8] << 4 * place
    return words.to(torch.uint32).view(torch.int32)


weight = ((numbers - zeros) * scales).t().contiguous()
stored = {"qweight": pack(numbers), "qzeros": pack(zeros), "scales": scales}
by_autoawq = awq["dequantize_gemm"](stored["qweight"], stored["qzeros"], scales, 4, group).t()

Path("packed").mkdir()
save_file({f"model.layers.0.self_attn.q_proj.{name}": tensor for name, tensor in stored.items()}, "packed/model.safetensors")
said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
Path("packed/config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))

from gptqmodel.utils.model_dequant import dequantize_model

dequantize_model("packed", "plain", target_dtype=torch.float16)
(by_gptqmodel,) = [tensor for path in Path("plain").glob("*.safetensors") for tensor in load_file(path).values()]
order = [next(row for row in range(rows) if torch.equal(by_gptqmodel[place], weight[row])) for place in range(8)]
print("autoawq gives the matrix back:", torch.equal(by_autoawq, weight))
print("rows of gptqmodel's:", order)
if not torch.equal(by_autoawq, weight) or order != [0, 2, 4, 6, 1, 3, 5, 7]:
    sys.exit("The behaviour has changed.")
PYTHON
