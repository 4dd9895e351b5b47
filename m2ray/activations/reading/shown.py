"""A run as it shows itself in Python, as one line and as a notebook's table: whose it is, what it holds and how far it is."""

from html import escape
from typing import TYPE_CHECKING

from m2ray.errors import shown
from m2ray.sites import shown_layers
from m2ray.sizes import bytes_in_words

if TYPE_CHECKING:
    from m2ray.activations.reading.view import RunView


def as_line(run: "RunView", url: str) -> str:
    """Reads nothing but the records."""
    facts = _facts(run)
    return shown(f"<run {url}: {facts['model']}; {facts['sites']}; {facts['tokens']}; {facts['stored']}; {facts['state']}>")


def as_html(run: "RunView", url: str) -> str:
    """The same as a table; whatever text comes from outside is escaped."""
    rows = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{escape(shown(value))}</td></tr>'
        for name, value in {"run": url, **_facts(run)}.items()
    )
    return f"<table>{rows}</table>"


def _facts(run: "RunView") -> dict[str, str]:
    job = run.job
    name = job.names.get("model", "").rstrip("/").rpartition("/")[2]
    layers = {site: [part.layer for part in run.parts if part.site == site and part.layer is not None] for site in run.sites}
    sites = [site + (f" at layers {shown_layers(sorted(numbers))}" if numbers else "") for site, numbers in layers.items()]
    chosen = "" if job.selection.is_all or not job.parts else f", {run.num_rows:,} rows a layer"
    unused = f" ({job.counts.quarantined:,} quarantined)" if job.counts.quarantined else ""
    far = f"{run.num_shards:,} of {job.num_shards:,} shards"
    return {
        "model": f"{f'{name}, ' if name else ''}{job.model.model_type} with {job.model.num_layers} layers of width {job.model.hidden_size}",
        "sites": ", ".join(sites) or "statistics alone",
        "tokens": f"{job.counts.sequences:,} sequences{unused}, {job.counts.tokens:,} tokens{chosen}",
        "stored": f"{bytes_in_words(run.num_bytes)} in {run.num_files:,} files{', computed in float8' if job.in_float8 else ''}",
        "state": "complete" if run.is_complete else f"not complete: {far}",
    }
