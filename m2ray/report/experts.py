"""How often the router chose each expert, where that was captured: as rows of router_topk, or as statistics of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from m2ray.activations.reading.reader import RunReader
from m2ray.report.drawing import SHADES, drawn
from m2ray.report.elements import figure, paragraph, section, table
from m2ray.report.sample import Sampled
from m2ray.statistics import places

_SITE, _KIND = "router_topk", "experts"

Counts = Mapping[int, npt.NDArray[np.int64]]
"""By layer how often each expert was chosen, [E], the same E for all layers."""


def experts(run: RunReader, sample: Sequence[Sampled]) -> Markup:
    """The section. Raises RunDamagedError or StoreError."""
    title = "Load of the experts"
    taken = [layer for (site, layer), kinds in places(run.job.statistics).items() if site == _SITE and _KIND in kinds and layer is not None]
    if taken and run.is_complete:
        found, source = (
            {layer: run.statistics(_SITE, layer).expert_load.numpy() for layer in taken},
            "Of all rows, from the run's statistics.",
        )
    elif _SITE in run.sites and sample:
        view = run.site(_SITE)
        found = {layer: _counted(view.layer(layer), sample) for layer in view.layer_numbers}
        source = f"Counted in {sum(each.num_rows for each in sample):,} rows of each layer, those of {len(sample)} sequences."
    else:
        return section("experts", title, paragraph("The run captured no choices of a router (site router_topk)."))
    return section("experts", title, paragraph(source), _drawn(_even(found)))


def _counted(layer: RunReader, sample: Sequence[Sampled]) -> npt.NDArray[np.int64]:
    ids = np.concatenate([layer.sequence(each.sequence_id)["expert_ids"].numpy().ravel() for each in sample])
    return np.bincount(ids.astype(np.int64))


def _even(found: Counts) -> Counts:
    """As long as the longest: the last experts of a layer may never have been chosen."""
    longest = max(map(len, found.values()))
    return {layer: np.pad(counts, (0, longest - len(counts))) for layer, counts in found.items()}


def _drawn(found: Counts) -> Markup:
    layers, counts_LE = list(found), np.array(list(found.values()), np.float64)
    load_LE = counts_LE * counts_LE.shape[1] / np.maximum(1, counts_LE.sum(axis=1, keepdims=True))
    rows = [
        (str(layer), f"{int(load.argmax())} ({load.max():.1f} times)", str(int((load == 0).sum())), f"{_used_evenly(counts):.1f}")
        for layer, load, counts in zip(layers, load_LE, counts_LE, strict=True)
    ]
    numbers = table(
        "Load of the experts by layer",
        ("layer", "busiest expert, next to an even load", "never chosen", "as good as so many used evenly"),
        rows,
    )

    def draw(axes: Any) -> None:
        image = axes.imshow(load_LE, aspect="auto", cmap=SHADES, interpolation="none", vmin=0)
        step = -(-len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.grid(visible=False)
        axes.set(xlabel="expert", ylabel="layer")
        axes.figure.colorbar(image, label="times an even load", fraction=0.03, pad=0.01)

    layer, expert = np.unravel_index(int(load_LE.argmax()), load_LE.shape)
    said = f"The busiest is expert {expert} of layer {layers[int(layer)]}, with {load_LE.max():.1f} times an even load."
    height = 1.6 + 0.06 * len(layers)
    return figure(drawn("experts-drawn", "Load of the experts by layer", said, draw, height), f"A row a layer. {said}", numbers)


def _used_evenly(counts: npt.NDArray[np.float64]) -> float:
    """As many experts as would, all used alike, be as hard to guess as these: the exponential of the entropy."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(shares * np.log(shares)).sum()))
