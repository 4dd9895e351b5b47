"""How large rows are: by layer, of the first token, by channel, and over the tokens of one prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from m2ray.activations.reading.reader import RunReader
from m2ray.activations.reading.statistics import LayerStatistics
from m2ray.report.drawing import COLOURS, SHADES, drawn
from m2ray.report.elements import figure, paragraph, section, table
from m2ray.report.sample import Sampled, Words, in_words
from m2ray.statistics import places

OUTLIER = 10.0
"""A channel is an outlier of a layer where its largest value is so many times that of the layer's median channel."""

_SHOWN_TOKENS = 64
_SHOWN_OUTLIERS = 3


@dataclass(frozen=True)
class LayerNorms:
    """L2 norms of a layer's rows: `first` of the rows of first tokens, None where not all tokens have rows; `channels` the largest absolute
    value of each channel, [W]; `prompt` the norms of the prompt's first rows.
    """

    layer: int
    mean: float
    first: float | None
    others: float | None
    channels: Any
    prompt: Any

    @property
    def outliers(self) -> list[tuple[int, float]]:
        """(channel, times the median channel), the largest first."""
        with np.errstate(invalid="ignore"):  # of a row that holds infinities all channels may be infinite
            times = self.channels / max(float(np.median(self.channels)), 1e-30)
        return [(int(place), float(times[place])) for place in np.argsort(-times) if times[place] >= OUTLIER]


def read_norms(run: RunReader, site: str, sample: Sequence[Sampled], prompt: Sampled) -> list[LayerNorms]:
    """The norms of a site, layer by layer; memory holds one sequence's rows of one layer. Raises RunDamagedError or StoreError."""
    return [
        _of_layer(run.site(site).layer(layer), layer, sample, prompt, run.job.selection.is_all) for layer in run.site(site).layer_numbers
    ]


def _of_layer(view: RunReader, layer: int, sample: Sequence[Sampled], prompt: Sampled, is_all: bool) -> LayerNorms:  # noqa: FBT001
    norms, channels, of_prompt = [], np.zeros(view.parts[0].columns[0].width), np.empty(0)
    for each in dict.fromkeys((*sample, prompt)):
        rows_NW = np.nan_to_num(view.sequence(each.sequence_id).float().numpy(), nan=np.inf, posinf=np.inf, neginf=np.inf)
        norms_N = np.sqrt(np.square(rows_NW, dtype=np.float64).sum(axis=1))
        if each == prompt:
            of_prompt = norms_N[:_SHOWN_TOKENS]
        if each in sample:
            norms.append(norms_N)
            channels = np.maximum(channels, np.abs(rows_NW).max(axis=0))
    firsts, others = np.array([each[0] for each in norms]), np.concatenate([each[1:] for each in norms])
    first = float(firsts.mean()) if is_all else None
    other = float(others.mean()) if is_all and len(others) else None
    return LayerNorms(layer, float(np.concatenate(norms).mean()), first, other, channels, of_prompt)


def summed_norms(run: RunReader, site: str) -> list[LayerNorms]:
    """The same from a finished run's statistics, of all rows, where it has both norms and moments; rows of one prompt they do not have."""
    taken = places(run.job.statistics)
    layers = [layer for (of, layer), kinds in taken.items() if of == site and layer is not None and {"norms", "moments"} <= kinds]
    return [_of_statistics(run.statistics(site, layer), layer) for layer in layers] if run.is_complete else []


def _of_statistics(known: LayerStatistics, layer: int) -> LayerNorms:
    bins = known.norms
    middles = (bins["at_least"].to_numpy() + bins["below"].to_numpy()) / 2
    channels = np.maximum(np.abs(known.min.numpy()), np.abs(known.max.numpy()))
    mean = float(np.average(middles, weights=bins["rows"].to_numpy()))
    return LayerNorms(layer, mean, None, None, channels, np.empty(0))


# -- by layer ---------------------------------------------------------------------------------------------------------


def norms(site: str, layers: Sequence[LayerNorms], source: str) -> Markup:
    """The section of the norms by layer, with first tokens and outlier channels; `source` says in words what they are of."""
    return section(
        "norms",
        f"Norms of {site} by layer",
        paragraph(source),
        _by_layer(site, layers),
        *_outliers(layers),
    )


def _by_layer(site: str, layers: Sequence[LayerNorms]) -> Markup:
    has_first = layers[0].first is not None
    series = {"all tokens": [each.mean for each in layers]}
    if has_first:
        series["first token"] = [_or_nan(each.first) for each in layers]
        series["other tokens"] = [_or_nan(each.others) for each in layers]
    numbers = table(
        f"Mean L2 norm of {site} by layer",
        ("layer", *series),
        ((str(each.layer), *(_short(values[place]) for values in series.values())) for place, each in enumerate(layers)),
    )

    def draw(axes: Any) -> None:
        for number, (name, values) in enumerate(series.items()):
            axes.plot(
                [each.layer for each in layers],
                values,
                "o-s-^-"[2 * number : 2 * number + 2],
                color=COLOURS[number],
                markersize=3,
                label=name,
            )
        if all(value > 0 and np.isfinite(value) for values in series.values() for value in values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_formatter("{x:,g}" if max(map(max, series.values())) < 10 * min(map(min, series.values())) else "")
        axes.set(xlabel="layer", ylabel="mean L2 norm")
        axes.figure.legend(loc="outside upper left", ncols=3)

    most = max(layers, key=lambda each: each.mean)
    said = f"The mean norm goes from {_short(layers[0].mean)} at layer {layers[0].layer} to {_short(layers[-1].mean)} at layer {layers[-1].layer}; it is largest at layer {most.layer}, {_short(most.mean)}."
    if most.first and most.others:
        said += f" There a first token's row is {most.first / most.others:.1f} times as long as the others'."
    return figure(drawn("norms-drawn", f"Mean L2 norm of {site} by layer", said, draw), f"Mean L2 norm by layer. {said}", numbers)


def _outliers(layers: Sequence[LayerNorms]) -> list[Markup]:
    found = {each.layer: each.outliers for each in layers}
    often = Counter(channel for outliers in found.values() for channel, _ in outliers).most_common(8)
    words = f"A channel is called an outlier of a layer where its largest absolute value is {OUTLIER:.0f} times that of the layer's median channel, or more."
    if not often:
        return [Markup("<h3>Outlier dimensions</h3>"), paragraph(words, "There is none.")]
    listed = "; ".join(f"{channel} in {count} of {len(layers)} layers" for channel, count in often)
    rows = (
        (
            str(layer),
            str(len(outliers)),
            ", ".join(f"{channel} ({_short(times)} times)" for channel, times in outliers[:_SHOWN_OUTLIERS]),
        )
        for layer, outliers in found.items()
    )
    return [
        Markup("<h3>Outlier dimensions</h3>"),
        paragraph(words, f"The most frequent: {listed}."),
        table("Outlier dimensions by layer", ("layer", "outliers", "the largest"), rows),
    ]


# -- one prompt -------------------------------------------------------------------------------------------------------


def prompt_norms(site: str, layers: Sequence[LayerNorms], prompt: Sampled, token_ids: Sequence[int], words: Words | None) -> Markup:
    """The section of one prompt's rows, token by token; `token_ids` are those of the rows, in order."""
    ids = list(token_ids[: len(layers[0].prompt)])
    names = [f"{place}: {word}" for place, word in enumerate(in_words(ids, words))]
    norms_LT = np.array([each.prompt for each in layers])
    numbers = table(
        f"Norms of {site}: a row a token, a column a layer",
        ("token", *(str(each.layer) for each in layers)),
        ((name, *map(_short, norms_LT[:, place])) for place, name in enumerate(names)),
    )
    finite = np.where(np.isfinite(norms_LT) & (norms_LT > 0), norms_LT, np.nan)

    def draw(axes: Any) -> None:
        from matplotlib.colors import LogNorm

        image = axes.imshow(
            finite.T, aspect="auto", cmap=SHADES, interpolation="none", norm=LogNorm() if np.isfinite(finite).any() else None
        )
        step = -(-len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), [str(each.layer) for each in layers[::step]])
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.grid(visible=False)
        axes.set_xlabel("layer")
        axes.figure.colorbar(image, label="L2 norm", fraction=0.03, pad=0.01, format="{x:,g}")

    largest = np.unravel_index(int(np.argmax(np.nan_to_num(finite))), finite.shape)
    said = f"The largest norm, {_short(float(norms_LT[largest]))}, is that of token {names[int(largest[1])]!r} at layer {layers[int(largest[0])].layer}."
    cut = f" The first {len(ids)} of its {prompt.num_rows:,} rows are shown." if prompt.num_rows > len(ids) else ""
    parts = " � stands for a part of a character." if any("�" in name for name in names) else ""
    return section(
        "prompt",
        f"Norms over the tokens of the prompt {prompt.row_id}",
        Markup("") if words else paragraph("Tokens are shown by their ids: the run's tokenizer is not at hand. Give it by --model."),
        figure(
            drawn("prompt-drawn", f"Norms of {site} over one prompt's tokens", said, draw, 1.2 + 0.19 * len(names)),
            f"{said}{cut}{parts}",
            numbers,
        ),
    )


def _label(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
