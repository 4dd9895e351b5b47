"""What was asked: the model, the sites, and the options that decide the rows."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from m2ray.activations.reading.reader import RunReader
from m2ray.report.elements import Cell, section, table
from m2ray.sites import shown_layers, sites_of
from m2ray.sizes import bytes_in_words


def asked(run: RunReader) -> Markup:
    """The section."""
    options = [(name, _in_words(value)) for name, value in sorted(run.job.options.items()) if value not in (None, {}, [], "")]
    return section(
        "asked",
        "What was asked",
        table("The run", ("", "value"), _facts(run), "words"),
        table("The options that decide the rows", ("option", "value"), options, "words"),
    )


def _facts(run: RunReader) -> Iterator[tuple[Cell, ...]]:
    job = run.job
    model = job.model
    yield "model", job.names.get("model", model.model_type)
    yield "its kind", f"{model.model_type}, {model.num_layers} layers, hidden size {model.hidden_size:,}"
    yield "prompts", job.names.get("prompts", "not recorded")
    captured = [f"{site} {shown_layers(layers)}".strip() for site, layers in sites_of(job.parts).items()]
    yield "captured", "; ".join(captured) or "no rows"
    if job.statistics:
        yield "statistics", _in_words(job.statistics)
    yield "begun", f"{job.created_at[:16].replace('T', ' ')} UTC"
    yield "begun by", ", ".join(f"{name} {version}" for name, version in {"m2ray": job.m2ray_version, **job.versions}.items())
    counts = job.counts
    yield "sequences", f"{counts.sequences:,} = {counts.ready:,} ready + {counts.quarantined:,} quarantined"
    yield "shards", f"{run.num_shards:,} of {job.num_shards:,} committed"
    yield "tokens", f"{run.num_tokens:,} of {counts.tokens:,}"
    yield "files", f"{run.num_files:,} with {bytes_in_words(run.num_bytes)}"
    yield "run id", job.run_id


def _in_words(value: Any) -> str:
    """An option's value; layers as ranges."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_in_words(each)}".rstrip(": ") for name, each in value.items())
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return shown_layers(value)
    return json.dumps(value, ensure_ascii=False)
