"""What the programs of peers share: their arguments, the prompts in batches of like length, and rows saved as benchmarks/loop.py saves them."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file


def arguments(**further: str) -> argparse.Namespace:
    """MODEL PROMPTS OUT [--dtype] [--batch], and `further` options with what they are; OUT is made."""
    parser = argparse.ArgumentParser()
    for name in ("model", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time")
    for name, what in further.items():
        parser.add_argument(f"--{name}", help=what)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    return options


def batches(options: argparse.Namespace, length: Callable[[str], int]) -> Iterator[tuple[list[int], list[str]]]:
    """The prompts' numbers and texts, sorted by length, so many at a time."""
    texts = [json.loads(line)["text"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    lengths = [length(text) for text in texts]
    by_length = sorted(range(len(texts)), key=lengths.__getitem__)
    for start in range(0, len(texts), options.batch):
        chosen = by_length[start : start + options.batch]
        yield chosen, [texts[number] for number in chosen]


def save(
    options: argparse.Namespace, chosen: Sequence[int], rows: Sequence[torch.Tensor], token_ids_BT: torch.Tensor, real_BT: torch.Tensor
) -> None:
    """Save a batch's rows [B, T, H] of each layer where `real_BT`, in bfloat16, with the prompt and the token of each."""
    real_BT = real_BT.bool()
    found = {f"layer_{layer}": hidden_BTH[real_BT].to(torch.bfloat16) for layer, hidden_BTH in enumerate(rows)}
    found |= {"prompt": torch.tensor(chosen).repeat_interleave(real_BT.sum(1)), "token_id": token_ids_BT[real_BT]}
    save_file(found, options.out / f"batch-{chosen[0]:06d}.safetensors")
