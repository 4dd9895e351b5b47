"""The page put together, section by section. Read `build_page` first."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from m2ray import __version__
from m2ray.activations.reading.reader import RunReader
from m2ray.activations.records import CommitRecord, read_commits
from m2ray.errors import RunDamagedError
from m2ray.report.asked import asked
from m2ray.report.drawing import require_matplotlib
from m2ray.report.elements import paragraph, section, text
from m2ray.report.experts import experts
from m2ray.report.lens import PROMPTS, Lens, lens
from m2ray.report.measured import Report, measured
from m2ray.report.norms import norms, prompt_norms, read_norms, summed_norms
from m2ray.report.quarantine import quarantine
from m2ray.report.sample import Sampled, Words, committed, named, spread
from m2ray.report.stages import memory, timeline
from m2ray.storage import Store

_REPORT_KEY = "report.json"
_READ_COMMITS = 1000

_CONTENTS = (
    ("asked", "What was asked"),
    ("measured", "Plan and measured"),
    ("timeline", "Timeline"),
    ("memory", "Memory"),
    ("quarantine", "Quarantine"),
    ("norms", "Norms by layer"),
    ("prompt", "One prompt"),
    ("experts", "Experts"),
    ("lens", "Logit lens"),
)


def build_page(store: Store, run: RunReader, *, row_id: str | None = None, words: Words | None = None, head: Lens | None = None) -> str:
    """A run as one HTML page that asks the network for nothing.

    Args:
        store: the run folder.
        run: the same, opened.
        row_id: the prompt whose tokens are shown; default: one from the middle of the run.
        words: from token ids to words; default: ids are shown.
        head: for the logit lens; it needs `words` too.

    Raises:
        MissingPackageError: matplotlib is not installed.
        NotInRunError: no committed sequence has that row id.
        RunDamagedError, StoreError: the run cannot be read.
    """
    require_matplotlib()
    report, sequences = _read_report(store), committed(run)
    shown = named(sequences, row_id) if row_id is not None else None
    sample = spread(sequences) if sequences else []
    prompts = list(dict.fromkeys([*([shown] if shown else []), *sample]))
    sections = [
        asked(run),
        measured(report),
        timeline(report, _commits(store, run), run.num_shards),
        memory(report),
        quarantine(run.quarantined, run.job.counts.sequences),
        *_norms(run, sample, prompts, words),
        experts(run, sample),
        lens(run, prompts[:PROMPTS], head, words),
    ]
    return _page(run, sections)


def _norms(run: RunReader, sample: Sequence[Sampled], prompts: Sequence[Sampled], words: Words | None) -> list[Markup]:
    site = _site(run)
    if sample and site in run.sites:
        layers = read_norms(run, site, sample, prompts[0])
        token_ids = run.site(site).layer(layers[0].layer).tokens(prompts[0].sequence_id)["token_id"].tolist()
        num_rows = sum(each.num_rows for each in sample)
        source = f"Of {num_rows:,} rows of each layer, those of {len(sample):,} sequences that are spread over the run."
        return [norms(site, layers, source), prompt_norms(site, layers, prompts[0], token_ids, words)]
    none = section("prompt", "Norms over one prompt", paragraph("No rows are committed from which they could be taken."))
    if layers := summed_norms(run, site):
        return [norms(site, layers, "Of all rows, from the run's statistics; a mean is that of bins, at most 1/64 off."), none]
    return [
        section("norms", "Norms by layer", paragraph("Neither rows are committed nor statistics from which they could be taken.")),
        none,
    ]


def _site(run: RunReader) -> str:
    """Whose norms are shown: the residual's, or those of the first site of vectors where that was not captured."""
    sites = [part.site for part in run.parts if part.layer is not None and part.columns[0].name == "activation"]
    return "residual" if "residual" in sites or not sites else sites[0]


def _read_report(store: Store) -> Report | None:
    if store.size(_REPORT_KEY) is None:
        return None
    try:
        report: dict[str, Any] = json.loads(store.read(_REPORT_KEY))
        measured(report), memory(report)  # what it lacks shows when it is read
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDamagedError(
            f"{store.where(_REPORT_KEY)} is not what m2ray writes ({error!r}).", "Restore it, or move it away."
        ) from error
    return report


def _commits(store: Store, run: RunReader) -> list[CommitRecord]:
    """All, or some that are spread evenly."""
    shards = run.committed_shards
    count = min(_READ_COMMITS, len(shards))
    return list(read_commits(store, run.job, [shards[place * len(shards) // count] for place in range(count)]))


def _page(run: RunReader, sections: Sequence[Markup]) -> str:
    model = run.job.names.get("model", run.job.model.model_type).rstrip("/").rpartition("/")[2]
    state = "complete" if run.is_complete else f"not complete: {run.num_shards:,} of {run.job.num_shards:,} shards"
    contents = Markup("").join(Markup('<li><a href="#{}">{}</a></li>').format(name, title) for name, title in _CONTENTS)
    page = Markup(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<link rel="icon" href="data:,"><title>{title}</title>\n<style>\n{style}</style></head>\n<body>\n'
        '<a class="skip" href="#content">To the content</a>\n<header><h1>{title}</h1>{state}\n'
        '<nav aria-label="Sections"><ul>{contents}</ul></nav></header>\n<main id="content">\n{sections}</main>\n'
        "<footer>{made}</footer>\n</body></html>\n"
    )
    style = Markup(files("m2ray.report").joinpath("page.css").read_text(encoding="utf-8"))  # noqa: S704 - a file of this package
    return str(
        page.format(
            title=text(f"m2ray: activations of {model}"),
            style=style,
            state=paragraph(f"Run {run.job.run_id[:8]}, {state}."),
            contents=contents,
            sections=Markup("").join(sections),
            made=text(f"Written by m2ray {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."),
        )
    )
