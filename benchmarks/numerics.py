"""How far a prompt's rows move with its company: each prompt alone against the same prompt in a mixed, padded micro-batch.

    python benchmarks/numerics.py --config tests/data/minimax_m2/config.json --format fp8

Prints the relative error of rows, |batch - alone| / |alone|, by compute dtype and layer. Everything is seeded; one thread.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.stage import Stage, StageSpec, load_stage
from scripts.make_checkpoint import make_checkpoint

SIZES = {"layers": 62, "hidden_size": 256, "intermediate_size": 128, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "vocab_size": 512}
EXPERTS = {"num_experts": 32, "experts_per_token": 8}


def sequences(count: int, longest: int) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Random prompts of log-normal lengths, seeded."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.3, 0.8, count), 2, longest).astype(int)
    return [rng.integers(10, SIZES["vocab_size"], length).astype(np.int32) for length in lengths]


def micro_batch(prompts: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> MicroBatch:
    """The prompts, right-padded to the longest."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    token_ids_BT = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        token_ids_BT[row, : len(prompt)] = prompt
    return MicroBatch(0, 0, True, np.arange(len(prompts)), lengths, token_ids_BT)


def rows_of(stage: Stage, batch: MicroBatch, dtype: torch.dtype) -> torch.Tensor:
    """What a stage captures, float64 [L, N, H]."""
    captured = stage.forward(batch, None).captured
    return torch.stack([torch.from_numpy(one.rows).view(dtype).double() for one in captured])


def measure(folder: Path, dtype_name: str, layers: int, prompts: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> torch.Tensor:
    """Relative error of each row, [L, N]: in the batch against alone."""
    dtype = getattr(torch, dtype_name)
    spec = StageSpec(str(folder), LayerSpan(0, layers), tuple(range(layers)), ("residual",), dtype_name, dtype_name, "auto", "cpu", 1)
    stage = load_stage(spec, lambda *_: None)
    together = rows_of(stage, micro_batch(prompts), dtype)
    alone = torch.cat([rows_of(stage, micro_batch([prompt]), dtype) for prompt in prompts], dim=1)
    return (together - alone).norm(dim=2) / alone.norm(dim=2)


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
        print("| compute dtype | layer | p50 | p99 | max |\n|---|---|---|---|---|")
        for dtype_name in ("float32", "bfloat16"):
            errors = measure(Path(scratch, "model"), dtype_name, options.layers, prompts)
            for layer in sorted({0, options.layers // 4, options.layers // 2, options.layers - 1}):
                p50, p99 = errors[layer].quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
                print(f"| {dtype_name} | {layer} | {p50:.1e} | {p99:.1e} | {errors[layer].max():.1e} |")


if __name__ == "__main__":
    main()
