"""The loop that people write on a laptop: transformers, prompts sorted by length, the hidden states of each batch saved. No m2ray in it.

    python benchmarks/loop.py MODEL PROMPTS OUT [--dtype bfloat16] [--batch 8]

Rows are those that `m2ray extract` keeps: every layer's output, padding left out, in bfloat16. The model is run without its head.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    rows: list[torch.Tensor] = []
    for layer in model.layers:  # of hidden_states the last is behind the final norm
        layer.register_forward_hook(lambda _module, _given, output: rows.append(output[0] if isinstance(output, tuple) else output))
    texts = [json.loads(line)["text"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    by_length = sorted(range(len(texts)), key=lengths.__getitem__)
    for start in range(0, len(texts), options.batch):
        chosen = by_length[start : start + options.batch]
        batch = tokenizer([texts[number] for number in chosen], padding=True, padding_side="right", return_tensors="pt")
        rows.clear()
        with torch.inference_mode():
            model(**batch, use_cache=False)
        real_BT = batch["attention_mask"].bool()
        found = {f"layer_{layer}": hidden_BTH[real_BT].to(torch.bfloat16) for layer, hidden_BTH in enumerate(rows)}
        found |= {"prompt": torch.tensor(chosen).repeat_interleave(real_BT.sum(1)), "token_id": batch["input_ids"][real_BT]}
        save_file(found, options.out / f"batch-{start:06d}.safetensors")


if __name__ == "__main__":
    main()
