"""How far a prompt's rows move with its company: each prompt alone against the same prompt in a mixed, padded micro-batch.

    python -m benchmarks.numerics --config tests/data/minimax_m2/config.json --format fp8

Prints the relative difference of rows, norm by norm, by compute dtype and layer; and what bfloat16 itself costs, as a scale for it.
Everything is seeded; one thread; random weights.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from scripts.make_checkpoint import make_checkpoint

SIZES = {"layers": 62, "hidden_size": 256, "intermediate_size": 128, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "vocab_size": 512}
EXPERTS = {"num_experts": 32, "experts_per_token": 8}


Prompt = np.ndarray[tuple[int], np.dtype[np.int32]]


def sequences(count: int, longest: int) -> list[Prompt]:
    """Random prompts of log-normal lengths, seeded."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.3, 0.8, count), 2, longest).astype(int)
    return [rng.integers(10, SIZES["vocab_size"], length).astype(np.int32) for length in lengths]


def micro_batch(prompts: list[Prompt]) -> MicroBatch:
    """The prompts, right-padded to the longest."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    token_ids_BT = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        token_ids_BT[row, : len(prompt)] = prompt
    return MicroBatch(0, 0, True, np.arange(len(prompts)), lengths, token_ids_BT)


def rows_of(stage: Stage, batch: MicroBatch, dtype: torch.dtype) -> torch.Tensor:
    """What a stage captures, float32 [L, N, H]."""
    captured = stage.forward(batch, None).captured
    return torch.stack([torch.from_numpy(one.columns[0]).view(dtype).float() for one in captured])


def extract(folder: Path, dtype_name: str, layers: int, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows [L, N, H], the prompts in one micro-batch and each alone."""
    spec = StageSpec(str(folder), LayerSpan(0, layers), dtype_name, "auto", "cpu", 1)
    stage, dtype = load_stage(spec, lambda *_: None), getattr(torch, dtype_name)
    stage.begin(CaptureSpec({"residual": tuple(range(layers))}, dtype_name))
    alone = torch.cat([rows_of(stage, micro_batch([prompt]), dtype) for prompt in prompts], dim=1)
    return rows_of(stage, micro_batch(prompts), dtype), alone


def show(what: str, rows: torch.Tensor, expected: torch.Tensor) -> None:
    """One line a depth: quantiles of |row - expected| / |expected|, and how many rows are the same to the bit."""
    for layer in sorted({0, len(rows) // 4, len(rows) // 2, len(rows) - 1}):
        error_N = (rows[layer].double() - expected[layer].double()).norm(dim=1) / expected[layer].double().norm(dim=1)
        p50, p99 = error_N.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        print(f"| {what} | {layer} | {p50:.1e} | {p99:.1e} | {error_N.max():.1e} | {(error_N == 0).double().mean():.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("tests/data/minimax_m2/config.json"))
    parser.add_argument("--format", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--layers", type=int, default=SIZES["layers"])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--longest", type=int, default=160)
    options = parser.parse_args()
    config = json.loads(options.config.read_text(encoding="utf-8"))
    sizes = {**SIZES, **(EXPERTS if "num_local_experts" in config else {}), "layers": options.layers}
    prompts = sequences(options.prompts, options.longest)
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch, "model"), config, overrides=sizes, fmt=options.format, seed=0)
        print(f"{config['model_type']}, {sizes}, torch {torch.__version__}")
        print(f"{len(prompts)} prompts, {sum(map(len, prompts))} tokens, longest {max(map(len, prompts))}\n")
        print("| compared | layer | p50 | p99 | max | same bits |\n|---|---|---|---|---|---|")
        batch_32, alone_32 = extract(Path(scratch, "model"), "float32", options.layers, prompts)
        batch_16, alone_16 = extract(Path(scratch, "model"), "bfloat16", options.layers, prompts)
        show("float32: batch, alone", batch_32, alone_32)
        show("bfloat16: batch, alone", batch_16, alone_16)
        show("bfloat16 batch, float32 batch", batch_16, batch_32)


if __name__ == "__main__":
    main()
