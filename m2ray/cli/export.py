"""`m2ray export`: a finished run as the files that a trainer reads."""

import time
from typing import TYPE_CHECKING

import click

from m2ray.activations.job import JobRecord, read_job
from m2ray.cli import Command
from m2ray.cli.output import say, terminal
from m2ray.errors import NotInRunError, RunConflictError
from m2ray.hub import folder_of
from m2ray.storage import looking, open_store

if TYPE_CHECKING:
    from m2ray.export.consumer import Norm, Target
    from m2ray.storage import Store


@click.command(cls=Command, kept="Units that were written whole are kept: the same command goes on.")
@click.argument("run", metavar="RUN")
@click.option(
    "--to", required=True, metavar="CONSUMER", help="speculators, saelens, specforge, nemo-dspark, modelopt or deepspec: docs/export.md."
)
@click.option("--output", required=True, metavar="URI", help="A new folder or bucket's prefix, or that of an export to be finished.")
@click.option("--layers", metavar="VALUE", help="m2ray's layer numbers, \"1,30,58,61\"; default: those of the trainer's documentation.")
@click.option("--context-size", type=click.IntRange(1), help="Tokens of a context; for saelens.")
@click.option("--model", metavar="FOLDER", help="The run's model, where the trainer reads something of its weights.")
def command(run: str, to: str, output: str, layers: str | None, context_size: int | None, model: str | None) -> None:
    """Write the finished run RUN as the files that the trainer CONSUMER reads, each sequence with its tokens, loss mask and states.

    What the run lacks is said by name before anything is written. Every file is whole or absent, and its checksum is kept: the same command
    again reads what is there, keeps what is right and does the rest.
    """
    from m2ray.chain.progress import Progress
    from m2ray.export.exporting import consumer_of, ids_of, plan_export, write_export

    model = folder_of(model) if model else None
    with looking():  # whether it can be reached; what takes hours bears a pause of the store
        job = read_job(open_store(run))
    export = plan_export(run, to, layers=layers, context_size=context_size, model_folder=model, norm_of=_norm_of, target_of=_target_of)
    named = ", ".join(f"{layer} = {name}" for layer, name in ids_of(export, to).items())
    say(
        f"{len(export.samples):,} sequences, {export.samples.num_tokens:,} tokens; layers, and what {consumer_of(to).name} calls them: {named}"
    )
    if remark := consumer_of(to).remark(export):
        say(remark)
    if model and job and (export.norm or export.target):
        require_weights(open_store(run), job, model)
    began = time.monotonic()
    with Progress(terminal()) as progress:

        def report(samples: int, written_bytes: int, kept_bytes: int) -> None:
            progress.exporting(samples, len(export.samples), written_bytes, kept_bytes, time.monotonic() - began)

        summary = write_export(export, to, output, report)
    say(f"Complete: {summary['files']:,} files with {summary['num_bytes']:,} bytes in {output}; m2ray_export.json holds the account.")


def require_weights(store: "Store", job: JobRecord, folder: str) -> None:
    """Raise RunConflictError if the checkpoint's weights are not the run's: one that was trained further has the same names and sizes."""
    from m2ray.activations.records import WEIGHTS_KEY, read_weights
    from m2ray.model.checkpoint import open_checkpoint
    from m2ray.model.weights import hash_weights

    if job.format_version == 1:
        say(f"A run of format 1 has no {WEIGHTS_KEY}: whether {folder} holds the weights of its rows is not known.")
        return
    recorded = read_weights(store, job)
    found = hash_weights(open_checkpoint(folder), job.layers_run, with_final_norm=job.with_final_norm)
    if found != {None: recorded.embedding, job.layers_run - 1: recorded.layers[-1]}:
        what = f"The weights at {folder} are not those of the run: its embedding or its last layer is not what {WEIGHTS_KEY} says."
        raise RunConflictError(what, "Give the run's by --model.")


def _norm_of(job: JobRecord, folder: str) -> "Norm":
    """The final norm of a run's model. Raises NotInRunError if its rows were rounded before they were stored, and as `final_norm`."""
    from m2ray.model.boundary import residual_dtype
    from m2ray.model.checkpoint import open_checkpoint
    from m2ray.model.final_norm import final_norm
    from m2ray.model.stage import DTYPES

    compute_dtype, store_dtype = DTYPES[job.options["compute_dtype"]], job.options["store_dtype"]
    computed = str(residual_dtype(open_checkpoint(folder).config) or compute_dtype).removeprefix("torch.")
    if computed != store_dtype:
        raise NotInRunError(
            f"The run computed rows in {computed} and stored {store_dtype}: the model's norm takes rows in the dtype in which they were computed.",
            f"Extract with store_dtype = {computed!r}.",
        )
    return final_norm(folder, job.fingerprints["model"], job.layers_run, compute_dtype)


def _target_of(job: "JobRecord", folder: str) -> "Target":
    """Embedding and head of a run's model. Raises as `target_weights` and `require_plain_scores`."""
    from m2ray.model.scores import require_plain_scores
    from m2ray.model.target_weights import target_weights

    target = target_weights(folder, job.fingerprints["model"], job.layers_run)
    require_plain_scores(target.config)
    return target
