"""`m2ray report`: a run as one self-contained HTML page."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from m2ray.activations.reading.reader import open_run
from m2ray.cli import Command
from m2ray.cli.export import require_weights
from m2ray.cli.output import say
from m2ray.errors import M2rayError
from m2ray.hub import folder_of
from m2ray.sizes import bytes_in_words
from m2ray.storage import looking, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m2ray.activations.job import JobRecord
    from m2ray.report.lens import Lens
    from m2ray.report.sample import Words

_KEY = "report.html"


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help=f"Where the page goes; default: {_KEY} in RUN."
)
@click.option("--prompt", metavar="ROW_ID", help="The prompt whose tokens are shown one by one; default: one of the run's.")
@click.option(
    "--model",
    metavar="FOLDER",
    help="The run's model: its tokenizer for the words, its final norm and head for the logit lens; default: the words alone, if it is where it was.",
)
def command(run: str, output: Path | None, prompt: str | None, model: str | None) -> None:
    """Write the run RUN, finished or not, as one HTML page that needs no network.

    It shows what was asked, plan against measured, stages, memory, quarantine, norms by layer and over one prompt, outlier dimensions, experts'
    load, and with --model the logit lens of five prompts. Needs matplotlib: pip install 'm2ray[report]'.
    """
    from m2ray.report.building import build_page
    from m2ray.report.drawing import require_matplotlib

    require_matplotlib()
    model = folder_of(model) if model else None
    with looking():
        store = open_store(run)
        opened = open_run(run)
        if model and opened.num_shards:
            require_weights(store, opened.job, model)
        head = _head(opened.job, model) if model else None
        with _words(opened.job, model) as words:
            page = build_page(store, opened, row_id=prompt, words=words, head=head).encode()
        if output is None:
            store.put(_KEY, page)
        else:
            output.write_bytes(page)
    say(f"{bytes_in_words(len(page))} written: {store.where(_KEY) if output is None else output}")


@contextmanager
def _words(job: "JobRecord", model: str | None) -> "Iterator[Words | None]":
    """The run's tokenizer; None, with a word why, where it is not named and not where it was."""
    from m2ray.audit.tokens import open_tokenizer
    from m2ray.model.checkpoint import open_checkpoint

    named = model or job.names.get("model")
    try:
        folder = folder_of(named) if named else None
        tokenizer = open_tokenizer(job, folder, open_checkpoint(folder).config.vocab_size) if folder else None
    except M2rayError as problem:
        if model:
            raise
        say(f"Tokens are shown by their ids: {problem.what}")
        tokenizer = None
    try:
        yield tokenizer.words if tokenizer else None
    finally:
        if tokenizer:
            tokenizer.close()


def _head(job: "JobRecord", model: str) -> "Lens":
    """Final norm and head of the run's model. Raises as `next_tokens`."""
    from m2ray.model.next_tokens import next_tokens
    from m2ray.model.stage import DTYPES

    return next_tokens(model, job.fingerprints["model"], job.layers_run, DTYPES[job.options["compute_dtype"]])
