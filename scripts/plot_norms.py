"""Draw the mean norm of the residual by layer of a run, as residual_norm.png in the run folder."""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

import m2ray


def plot_norms(run_folder: Path) -> Path:
    """Read every layer once, in bounded memory. Returns the picture's path."""
    view = m2ray.open_run(str(run_folder)).site("residual")
    layers = list(view.layer_numbers)
    norms = [view.layer(layer).mean_norm() for layer in layers]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(layers, norms, marker="o", markersize=3)
    axes.set(xlabel="layer", ylabel="mean L2 norm of a row", title="Residual stream, mean norm by layer")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    picture = run_folder / "residual_norm.png"
    figure.savefig(picture, dpi=150)
    return picture


if __name__ == "__main__":
    print(plot_norms(Path(sys.argv[1])))
