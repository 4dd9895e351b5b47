"""Fit linear probes: do a layer's activations tell which token a row is of, where in its sequence it stands, or your own label?

    python examples/linear_probe.py RUN --layers 0 15 30 --target token
    python examples/linear_probe.py RUN --layers 0 15 30 --target label --pool mean

A target is `token`, `position`, or a column of the prompts that the run was told to keep (`keep_columns = ["label"]`). With `--pool` a
sequence is one row: its last one, or the mean of all. The classes are the commonest values of the target (of numbers make a few bins first); rows of others are left out.
A probe is a ridge regression onto the classes, whose sums are added up shard by shard in bounded memory. One sequence in five is held out,
by its number, and accuracies are of its rows: prompts that are much alike should not stand beside each other.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import m2ray

TOKEN_TARGETS = {"token": "token_id", "position": "position"}

Values = Callable[[Any], list[Any]]
"""From a shard's tokens, one a row, to the target's values."""


def values_of(run: Any, target: str) -> Values:
    """How the target is read. Raises KeyError for a column that the run has not kept."""
    if target in TOKEN_TARGETS:
        return lambda tokens: list(tokens[TOKEN_TARGETS[target]].tolist())
    by_sequence = run.sequences[target].to_pylist()
    return lambda tokens: [by_sequence[number] for number in tokens["sequence_id"]]


def pooled(rows: Tensor, tokens: Any, pool: str) -> tuple[Tensor, Any]:
    """The rows as they are, float64 [N, W], or one a sequence, [S, W]; and the tokens that they are told by, those of the last rows."""
    if pool == "none":
        return rows.double(), tokens
    _, starts = np.unique(tokens["sequence_id"], return_index=True)
    stops = np.append(starts[1:], len(tokens))
    if pool == "last":
        return rows[stops - 1].double(), tokens[stops - 1]
    return torch.stack([rows[start:stop].double().mean(0) for start, stop in zip(starts, stops, strict=True)]), tokens[stops - 1]


def examples(view: Any, values: Values, classes: list[Any], pool: str, *, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows with a 1 behind them, float64 [N, W + 1], and their classes' numbers, int64 [N]."""
    numbers = {value: number for number, value in enumerate(classes)}
    for shard in view.shards():
        if not len(shard.tokens):
            continue
        rows, tokens = pooled(shard.activations, shard.tokens, pool)
        labels = np.array([numbers.get(value, -1) for value in values(tokens)])
        chosen = np.flatnonzero((labels >= 0) & ((tokens["sequence_id"] % 5 == 0) == held_out))
        yield torch.cat([rows[chosen], torch.ones(len(chosen), 1, dtype=rows.dtype)], 1), torch.from_numpy(labels[chosen])


def fit(view: Any, values: Values, classes: list[Any], pool: str, ridge: float) -> Tensor:
    """The probe, float64 [W + 1, classes]: the solution of (X'X + ridge * mean(diag X'X) I) P = X'Y."""
    products: Tensor | int = 0
    targets: Tensor | int = 0
    for rows, labels in examples(view, values, classes, pool, held_out=False):
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
    parser.add_argument("--target", default="token", help="token, position, or a kept column")
    parser.add_argument("--pool", choices=["none", "last", "mean"], default="none", help="one row a sequence: its last, or the mean")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--ridge", type=float, default=1e-4)
    options = parser.parse_args()

    run = m2ray.open_run(options.run)
    if options.target not in TOKEN_TARGETS and options.target not in run.sequences.column_names:
        parser.error(f"--target {options.target}: the run has kept no such column; extract with keep_columns = [{options.target!r}]")
    residual, values = run.site("residual"), values_of(run, options.target)
    tokens = residual.tokens()
    counted = Counter(value for value in values(pooled(torch.empty(len(tokens), 1), tokens, options.pool)[1]) if value is not None)
    classes = [value for value, _ in counted.most_common(options.classes)]
    print(f"Which {options.target}, of the {len(classes)} commonest of {len(counted)}?")
    for layer in options.layers:
        view = residual.layer(layer)
        probe = fit(view, values, classes, options.pool, options.ridge)
        right, of_class = 0, torch.zeros(len(classes), dtype=torch.long)
        for rows, labels in examples(view, values, classes, options.pool, held_out=True):
            right += int(((rows @ probe).argmax(1) == labels).sum())
            of_class += torch.bincount(labels, minlength=len(classes))
        measured = max(1, int(of_class.sum()))
        print(
            f"layer {layer}: held-out accuracy {right / measured:.3f} of {measured} rows;"
            f" always the commonest class: {int(of_class.max()) / measured:.3f}"
        )


if __name__ == "__main__":
    main()
