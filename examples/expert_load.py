"""Draw how often a model's router chooses each expert, layer by layer, from a run with the site router_topk.

    m2ray extract ... --sites "router_topk:all"
    python examples/expert_load.py RUN --svg load.svg

A cell's shade is what share of the choices went to an expert, next to an even load: ░ less than half of it, ▒ up to once, ▓ up to twice,
█ more; blank is an expert that was never chosen. Where there are more experts than `--cells`, neighbours share a cell.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import m2ray
from m2ray.activations.reading.reader import RunReader

_EDGES, _SHADES = torch.tensor([0.0, 0.5, 1.0, 2.0]), " ░▒▓█"


def choices(layer: RunReader) -> Tensor:
    """How often each expert was chosen, int64 [experts], as far as the highest that was."""
    counts = torch.zeros(0, dtype=torch.int64)
    for shard in layer.shards():
        found = shard.activations["expert_ids"].flatten().long().bincount(minlength=len(counts))
        counts = found + torch.nn.functional.pad(counts, (0, len(found) - len(counts)))
    return counts


def used_evenly(counts: Tensor) -> float:
    """As many experts as would, all used alike, be as hard to guess as these: the exponential of the entropy."""
    shares = counts[counts > 0] / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def drawn(load: Tensor, cells: int) -> str:
    """A layer's line; `load` is each expert's share of the choices over an even share."""
    means = torch.stack([part.mean() for part in load.tensor_split(min(cells, len(load)))])
    return "".join(_SHADES[number] for number in torch.bucketize(means, _EDGES).tolist())


def svg(loads: list[Tensor], layers: list[int]) -> str:
    """A square an expert, a row a layer; an even load is mid-grey, twice as much and more is black."""
    size, left = 8, 32
    squares = [
        f'<rect x="{left + size * expert}" y="{size * row}" width="{size}" height="{size}" fill-opacity="{min(1.0, value / 2):.2f}"/>'
        for row, load in enumerate(loads)
        for expert, value in enumerate(load.tolist())
    ]
    labels = [f'<text x="0" y="{size * (row + 1)}" font-size="{size}">{layer}</text>' for row, layer in enumerate(layers)]
    width, height = left + size * max(map(len, loads)), size * len(loads)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{"".join(squares + labels)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: a path or a URL")
    parser.add_argument("--cells", type=int, default=64, help="of a line, at most")
    parser.add_argument("--svg", type=Path, help="file for a drawing with every expert")
    options = parser.parse_args()

    routed = m2ray.open_run(options.run).site("router_topk")
    layers = sorted(routed.layer_numbers)
    counts = [choices(routed.layer(layer)) for layer in layers]
    num_experts = max(map(len, counts))
    padded = [torch.nn.functional.pad(each, (0, num_experts - len(each))) for each in counts]
    loads = [each * num_experts / max(1, int(each.sum())) for each in padded]
    print(f"{routed.num_tokens} tokens in {options.run}; {num_experts} experts")
    for layer, load, each in zip(layers, loads, padded, strict=True):
        busiest, never = int(load.argmax()), int((each == 0).sum())
        print(
            f"layer {layer:>3} |{drawn(load, options.cells)}| expert {busiest} has {float(load.max()):.1f} times an even load;"
            f" {never} never chosen; as good as {used_evenly(each):.1f} used evenly"
        )
    if options.svg:
        options.svg.write_text(svg(loads, layers), encoding="utf-8")


if __name__ == "__main__":
    main()
