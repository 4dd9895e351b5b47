"""Fit linear probes: do a layer's activations tell which token a row is of, or where in its sequence it stands?

    python examples/linear_probe.py RUN --layers 0 15 30 --target token

The classes are the commonest values of the target; rows of others are left out. A probe is a ridge regression onto the classes, whose
sums one epoch of the stream adds up in bounded memory. One sequence in five is held out, and accuracies are of its rows.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import m2ray
from m2ray.activations.reading.stream import ActivationStream

TARGETS = {"token": "token_id", "position": "position"}


def examples(stream: ActivationStream, column: str, classes: Tensor, *, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows with a 1 behind them, float64 [N, W + 1], and their classes' numbers, int64 [N]."""
    for batch in stream:
        values = batch[column].long()
        chosen = torch.isin(values, classes) & ((batch["sequence_id"] % 5 == 0) == held_out)
        rows = batch["activations"][chosen].double()
        yield torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1), torch.searchsorted(classes, values[chosen])


def fit(stream: ActivationStream, column: str, classes: Tensor, ridge: float) -> Tensor:
    """The probe, float64 [W + 1, classes]: the solution of (X'X + ridge * mean(diag X'X) I) P = X'Y."""
    products: Tensor | int = 0
    targets: Tensor | int = 0
    for rows, labels in examples(stream, column, classes, held_out=False):
        products = products + rows.T @ rows
        targets = targets + rows.T @ torch.nn.functional.one_hot(labels, len(classes)).double()
    assert isinstance(products, Tensor), "no row to fit"
    damping = ridge * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    probe: Tensor = torch.linalg.solve(products + damping, targets)
    return probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: a path or a URL")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--target", choices=TARGETS, default="token")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--ridge", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0, help="order of the rows; sums of floats depend on it a little")
    options = parser.parse_args()

    residual, column = m2ray.open_run(options.run).site("residual"), TARGETS[options.target]
    values, counts = np.unique(residual.tokens()[column], return_counts=True)
    classes = torch.from_numpy(np.sort(values[np.argsort(-counts, kind="stable")[: options.classes]])).long()
    print(f"Which {options.target}, of the {len(classes)} commonest of {len(values)}?")
    for layer in options.layers:
        stream = residual.layer(layer).stream(batch_rows=4096, shuffle_buffer_bytes=256 << 20, seed=options.seed)
        probe = fit(stream, column, classes, options.ridge)
        right, of_class = 0, torch.zeros(len(classes), dtype=torch.long)
        for rows, labels in examples(stream, column, classes, held_out=True):
            right += int(((rows @ probe).argmax(1) == labels).sum())
            of_class += torch.bincount(labels, minlength=len(classes))
        measured = max(1, int(of_class.sum()))
        print(
            f"layer {layer}: held-out accuracy {right / measured:.3f} of {measured} rows;"
            f" always the commonest class: {int(of_class.max()) / measured:.3f}"
        )


if __name__ == "__main__":
    main()
