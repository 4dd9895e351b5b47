"""Train a small sparse autoencoder on one layer of a run, on a disk or in a bucket.

    python examples/train_sae.py s3://bucket/run --layer 30

A TopK autoencoder: of `--features` directions each row is rebuilt from the `--active` that fit it best. One sequence in ten is held out;
all measures are of its rows. On two cores `--steps 200` is enough for a first look. They are compared with as many principal components, which are the same for every row.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor, nn

import m2ray
from m2ray.activations.reading.stream import ActivationStream


class SparseAutoencoder(nn.Module):
    """Rows [N, W] to features [N, F], of which `active` are not zero, and back."""

    def __init__(self, width: int, features: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(features, width), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().T.clone())
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows as rebuilt, and their features."""
        strongest = torch.relu(rows @ self.encoder + self.bias).topk(self.active, dim=1)
        features = torch.zeros(len(rows), len(self.bias)).scatter(1, strongest.indices, strongest.values)
        return features @ self.decoder, features


def is_held_out(sequence_id: Tensor) -> Tensor:
    return sequence_id % 10 == 0


def training_rows(stream: ActivationStream) -> Iterator[Tensor]:
    """Epoch after epoch, float32 [N, W]."""
    for epoch in count():
        stream.set_epoch(epoch)
        for batch in stream:
            yield batch["activations"].float()[~is_held_out(batch["sequence_id"])]


def held_out_rows(stream: ActivationStream, at_most: int) -> Tensor:
    found: list[Tensor] = []
    stream.set_epoch(0)
    for batch in stream:
        found.append(batch["activations"].float()[is_held_out(batch["sequence_id"])])
        if sum(map(len, found)) >= at_most:
            break
    return torch.cat(found)[:at_most]


def explained(rows: Tensor, rebuilt: Tensor) -> float:
    """The share of the variance that the rebuilt rows explain."""
    return 1 - float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: a path or a URL")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--active", type=int, default=16, help="features of a row that are not zero, at most")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the weights (safetensors)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    view = m2ray.open_run(options.run).site("residual").layer(options.layer)
    stream = view.stream(batch_rows=options.batch_rows, shuffle_buffer_bytes=256 << 20, seed=options.seed)
    held_out, batches = held_out_rows(stream, 8192), training_rows(stream)
    if not 0 < len(held_out) < view.num_rows:
        parser.error(f"{options.run} has too few sequences to hold some out.")
    sample = torch.cat(list(islice(batches, 8)))
    mean, scale = sample.mean(0), (sample - sample.mean(0)).square().mean().sqrt()
    _, _, components = torch.pca_lowrank(sample, q=options.active, niter=4)
    held_out = (held_out - mean) / scale
    print(f"{view.num_rows} rows of {sample.shape[1]} in {options.run}; {len(held_out)} held-out rows are measured")

    model = SparseAutoencoder(sample.shape[1], options.features, options.active)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    begin = time.perf_counter()
    for step in range(options.steps):
        rows = (next(batches) - mean) / scale
        rebuilt, _ = model(rows)
        loss = (rows - rebuilt).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.decoder.copy_(nn.functional.normalize(model.decoder, dim=1))
        if step % (options.steps // 5 or 1) == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}, {time.perf_counter() - begin:.0f} s")

    with torch.no_grad():
        rebuilt, features = model(held_out)
    print(f"explained variance: {explained(held_out, rebuilt):.3f}")
    print(f"explained by {options.active} principal components: {explained(held_out, held_out @ components @ components.T):.3f}")
    print(f"L0: {float((features > 0).sum(1).float().mean()):.1f} of {options.features} features a row")
    print(f"features that no held-out row uses: {float((features == 0).all(0).float().mean()):.0%}")
    if options.save:
        from safetensors.torch import save_file

        save_file({**model.state_dict(), "mean": mean, "scale": scale}, options.save)


if __name__ == "__main__":
    main()
