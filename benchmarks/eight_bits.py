"""What rows in 8 bits cost a sparse autoencoder: its explained variance from float8 and int8 rows of a trained model, next to bfloat16's.

    scripts/trained_model MODEL
    python -m benchmarks.eight_bits MODEL --layer 15

The text is Python's own reference topics, in contexts of 256 tokens; the first position of each, whose row is many times as long as others, is left
out. One context in eight is held out. An autoencoder (examples/train_sae.py) is trained for each store dtype and seed, which is that of its weights and of
the rows' order; explained is the variance of the held-out rows as they were computed. One thread.
"""

import argparse
import time
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from tokenizers import Tokenizer

from examples.train_sae import SparseAutoencoder, explained
from m2ray.activations.reading.values import decoded
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.capture import CaptureSpec
from m2ray.model.eight_bits import Encoder
from m2ray.model.stage import StageSpec, load_stage
from m2ray.sites import EIGHT_BITS, parts_of_run

LENGTH = 256
BATCH = 256


def contexts(model: Path, count: int) -> torch.Tensor:
    """Token ids of the text, int32 [count, LENGTH]."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return torch.tensor(ids[: count * LENGTH], dtype=torch.int32).view(-1, LENGTH)


def rows_of(model: Path, layer: int, ids_BT: torch.Tensor) -> torch.Tensor:
    """The layer's residual without first positions, float32 [B, T - 1, H]."""
    stage = load_stage(StageSpec(str(model), LayerSpan(0, layer + 1), "float32", "auto", "cpu", 1), lambda *_: None)
    stage.begin(CaptureSpec({"residual": (layer,)}, "float32"))
    found = []
    for number, piece in enumerate(ids_BT.split(4)):
        counts = np.full(len(piece), LENGTH, np.int32)
        batch = MicroBatch(0, number, False, np.arange(len(piece)), counts, piece.numpy())
        found.append(torch.from_numpy(stage.forward(batch, None).captured[0].columns[0].copy()).view(torch.float32))
    return torch.cat(found).view(len(ids_BT), LENGTH, -1)[:, 1:].contiguous()


def stored(rows_NH: torch.Tensor, store_dtype: str) -> torch.Tensor:
    """Rows as a reader gives them, float32 [N, H]."""
    if store_dtype not in EIGHT_BITS:
        return rows_NH.to(getattr(torch, store_dtype)).float()
    (part,) = parts_of_run({"residual": (0,)}, store_dtype, rows_NH.shape[1])
    return decoded(*Encoder().encode(part, rows_NH))


def trained(rows_NH: torch.Tensor, features: int, active: int, steps: int, seed: int) -> SparseAutoencoder:
    torch.manual_seed(seed)
    model = SparseAutoencoder(rows_NH.shape[1], features, active)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = rows_NH[torch.randint(len(rows_NH), (BATCH,))]
        loss = (rows - model(rows)[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.decoder.copy_(torch.nn.functional.normalize(model.decoder, dim=1))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint's folder, such as scripts/trained_model makes")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--features", type=int, default=1152)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)

    begin = time.perf_counter()
    rows = rows_of(options.model, options.layer, contexts(options.model, options.contexts))
    is_held_out = torch.arange(len(rows)) % 8 == 0
    train, held_out = (rows[chosen].flatten(0, 1) for chosen in (~is_held_out, is_held_out))
    mean, scale = train.mean(0), (train - train.mean(0)).square().mean().sqrt()
    print(f"{len(train):,} rows of {train.shape[1]}, {len(held_out):,} held out, after {time.perf_counter() - begin:.0f} s", flush=True)
    for store_dtype in ("bfloat16", *EIGHT_BITS):
        seen = stored(held_out, store_dtype)
        lost = float((seen - held_out).norm() / held_out.norm())
        lost_variance = float((seen - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum())
        print(f"{store_dtype}: {lost:.3%} of the values lost (root mean square), {lost_variance:.3%} of the variance", flush=True)
        for seed in options.seeds:
            model = trained((stored(train, store_dtype) - mean) / scale, options.features, options.active, options.steps, seed)
            with torch.no_grad():
                rebuilt, _ = model((seen - mean) / scale)
            share = explained((held_out - mean) / scale, rebuilt)
            print(f"  seed {seed}: explained variance {share:.4f}, after {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
