"""Train a small transcoder on one layer of a run: from what enters the MLP to what it adds to the stream, through few features.

    m2ray extract ... --sites "mlp_in:12, mlp:12"
    python examples/train_transcoder.py RUN --layer 12

Both sites are streamed with one seed, which gives the same tokens in the same order; every batch is held to it. One sequence in ten is held
out, and all measures are of its rows. They are compared with the best linear map, which needs no features and reads all channels.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor, nn

import m2ray
from m2ray.activations.reading.stream import ActivationStream

Pair = tuple[Tensor, Tensor]
"""What enters the MLP and what it adds, float32 [N, W] each."""


class Transcoder(nn.Module):
    """Rows [N, W] to features [N, F], of which `active` are not zero, and from them to other rows [N, W]."""

    def __init__(self, width: int, features: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.encoder = nn.Linear(width, features)
        self.decoder = nn.Linear(features, width)
        nn.init.normal_(self.decoder.weight, std=0.01)

    def forward(self, rows: Tensor) -> Tensor:
        strongest = torch.relu(self.encoder(rows)).topk(self.active, dim=1)
        features = torch.zeros(len(rows), self.encoder.out_features).scatter(1, strongest.indices, strongest.values)
        rebuilt: Tensor = self.decoder(features)
        return rebuilt


def pairs(streams: tuple[ActivationStream, ActivationStream], epoch: int, *, held_out: bool) -> Iterator[Pair]:
    """An epoch of both sites, row for row."""
    for stream in streams:
        stream.set_epoch(epoch)
    for entering, added in zip(*streams, strict=True):
        assert all(torch.equal(entering[name], added[name]) for name in ("sequence_id", "position")), "rows of other tokens"
        chosen = (entering["sequence_id"] % 10 == 0) == held_out
        yield entering["activations"].float()[chosen], added["activations"].float()[chosen]


def explained(rows: Tensor, rebuilt: Tensor) -> float:
    """The share of the variance that the rebuilt rows explain."""
    return 1 - float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())


def linear_map(found: list[Pair]) -> Tensor:
    """The best linear map with an offset, float32 [W + 1, W]: ridge regression in float64."""
    entering, added = (torch.cat(side).double() for side in zip(*found, strict=True))
    entering = nn.functional.pad(entering, (0, 1), value=1.0)
    products = entering.T @ entering
    damping = 1e-4 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    solved: Tensor = torch.linalg.solve(products + damping, entering.T @ added).float()
    return solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: a path or a URL")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--active", type=int, default=32, help="features of a row that are not zero, at most")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the weights (safetensors)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    run = m2ray.open_run(options.run)
    entering, added = (
        run.site(site).layer(options.layer).stream(batch_rows=options.batch_rows, shuffle_buffer_bytes=128 << 20, seed=options.seed)
        for site in ("mlp_in", "mlp")
    )
    streams = (entering, added)
    held_out = [torch.cat(side) for side in zip(*pairs(streams, 0, held_out=True), strict=True)]
    seen = [pair for pair, _ in zip(pairs(streams, 0, held_out=False), range(16), strict=False)]
    if not len(held_out[0]) or not sum(len(rows) for rows, _ in seen):
        parser.error(f"{options.run} has too few sequences to hold some out.")
    scales = [torch.cat(side).square().mean().sqrt() for side in zip(*seen, strict=True)]
    print(f"{run.num_tokens} rows of {held_out[0].shape[1]} in {options.run}; {len(held_out[0])} held-out rows are measured")

    model = Transcoder(held_out[0].shape[1], options.features, options.active)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = (pair for epoch in count() for pair in pairs(streams, epoch, held_out=False))
    begin = time.perf_counter()
    for step in range(options.steps):
        rows, wanted = (side / scale for side, scale in zip(next(batches), scales, strict=True))
        loss = (model(rows) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (options.steps // 5 or 1) == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}, {time.perf_counter() - begin:.0f} s")

    with torch.no_grad():
        rebuilt = model(held_out[0] / scales[0]) * scales[1]
    best = nn.functional.pad(held_out[0], (0, 1), value=1.0) @ linear_map(seen)
    print(f"explained variance of the MLP: {explained(held_out[1], rebuilt):.3f} by {options.active} of {options.features} features")
    print(f"explained by a linear map of {sum(len(rows) for rows, _ in seen)} rows: {explained(held_out[1], best):.3f}")
    if options.save:
        from safetensors.torch import save_file

        save_file({**model.state_dict(), "scale_in": scales[0], "scale_out": scales[1]}, options.save)


if __name__ == "__main__":
    main()
