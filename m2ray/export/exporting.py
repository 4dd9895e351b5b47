"""A run exported: what the consumer needs is looked for, all that is missing is said at once, and its units are written or kept."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m2ray import __version__
from m2ray.activations.job import JobRecord
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.errors import ConfigError, M2rayError, NotInRunError, did_you_mean, in_ranges, raise_all
from m2ray.export.consumer import Consumer, Export, Norm, Target, Unit
from m2ray.export.output import Output
from m2ray.export.samples import NORMED, SITE, Samples, absent_layers
from m2ray.hub import without_revision
from m2ray.option_text import parse_layers
from m2ray.storage import open_store

CONSUMERS = ("speculators", "saelens", "specforge", "nemo-dspark", "modelopt", "deepspec")
"""Each has a file of its name in this room; "-" is "_" there."""

FORMAT_VERSION = 1
"""Of `m2ray_export.json` and the records beside it."""

_SHOWN_SEQUENCES = 5
_MOST_TOKENS = 1 << 31
"""Less than that a sequence has."""

Report = Callable[[int, int, int], None]
"""Samples done, bytes written, and bytes kept of an earlier try."""


def consumer_of(name: str) -> Consumer:
    """What the consumer's file states. Raises ConfigError for a name that has none."""
    if name not in CONSUMERS:
        raise ConfigError(f"There is no consumer {name!r}.", f"{did_you_mean(name, CONSUMERS)}Give one of {', '.join(CONSUMERS)} (--to).")
    consumer: Consumer = importlib.import_module(f"m2ray.export.{name.replace('-', '_')}").CONSUMER
    return consumer


def plan_export(
    run: str | Path,
    to: str,
    *,
    layers: str | None = None,
    context_size: int | None = None,
    model_folder: str | None = None,
    norm_of: Callable[[JobRecord, str], Norm] | None = None,
    target_of: Callable[[JobRecord, str], Target] | None = None,
) -> Export:
    """Look whether the run has all that the consumer reads. Writes nothing.

    Args:
        run: the run folder.
        to: the consumer's name.
        layers: m2ray's numbers of the layers, as the option `layers` of an extraction; None for those that the consumer's documentation has.
        context_size: tokens of a context, where the consumer reads contexts.
        model_folder: the run's model, where the consumer reads something of its weights.
        norm_of: gives the final norm of the run's model in that folder.
        target_of: gives what a trainer reads of that model.

    Raises:
        ConfigError: an option is missing or not the consumer's.
        NotInRunError: the run is not finished, or lacks layers or loss masks.
        RunDamagedError, StoreError: the run cannot be read.
    """
    consumer, catalogue = consumer_of(to), Catalogue(open_store(run))
    job = catalogue.job
    of_run = [part.layer for part in job.parts if part.site == SITE and part.layer is not None]
    num_layers = job.model.num_layers
    chosen = parse_layers(layers, num_layers) if layers is not None else consumer.default_layers(num_layers, of_run)
    has_norm = consumer.needs_norm and any(part.site == NORMED for part in job.parts)
    there = sorted({*of_run, num_layers - 1}) if has_norm else of_run
    problems = [*_run_problems(catalogue), *_token_problems(job), *_layer_problems(catalogue, consumer, chosen, there)]
    problems += _option_problems(consumer, to, context_size, model_folder, has_norm=has_norm)
    found = [layer for layer in chosen if layer in there]
    samples = Samples(catalogue, found, is_normed=has_norm and found[-1:] == [num_layers - 1])
    if not len(samples):
        what = f"The run at {catalogue.store.url} has no sequences that could be exported: all of them were quarantined."
        raise_all([*problems, NotInRunError(what)])
    problems += _mask_problems(catalogue, samples) if consumer.needs_mask else []
    raise_all(problems + (_row_problems(job, consumer, samples) if samples.layers else []))
    norm = norm_of(job, model_folder) if consumer.needs_norm and not has_norm and norm_of and model_folder else None
    target = target_of(job, model_folder) if consumer.needs_model and target_of and model_folder else None
    name, compute_dtype = without_revision(job.names.get("model", "")), str(job.options.get("compute_dtype", ""))
    return Export(samples, num_layers, job.run_id, name, context_size, target, norm, compute_dtype)


def write_export(export: Export, to: str, output: str | Path, report: Report = lambda _samples, _written, _kept: None) -> dict[str, Any]:
    """Write the consumer's files to a folder or bucket, or what is missing of them, and give what `m2ray_export.json` says.

    Raises:
        RunConflictError: the output holds something else.
        RunDamagedError: a file of the run is not what was written.
        StoreError: the run cannot be read, or the output not be written.
    """
    consumer = consumer_of(to)
    ends = [0, *consumer.unit_ends(export)]
    units = [Unit(number, len(ends) - 1, ends[number], ends[number + 1]) for number in range(len(ends) - 1)]
    written = kept = 0
    with Output(open_store(output), _identity(export, consumer, to)) as files:
        for unit in units:
            found = files.kept_unit(unit.number)
            if found is None:
                consumer.write(export, files, unit, export.samples.read(unit.start, unit.stop))
                written += files.end_unit(unit.number)
            else:
                kept += found
            report(unit.stop, written, kept)
        if files.kept_unit(len(units)) is None:
            consumer.finish(export, files, units)
            files.end_unit(len(units))
        return files.finish(
            {
                "samples": len(export.samples),
                "tokens": export.samples.num_tokens,
                "compute_dtype": export.compute_dtype,
                "m2ray_version": __version__,
            }
        )


def ids_of(export: Export, to: str) -> dict[int, str]:
    """What the consumer calls each of the layers, by m2ray's numbers."""
    layers = export.samples.layers
    return {layer: consumer_of(to).id_of(layers, place, export.num_layers) for place, layer in enumerate(layers)}


def _identity(export: Export, consumer: Consumer, to: str) -> dict[str, Any]:
    """What decides each byte of the files."""
    return {
        "format_version": FORMAT_VERSION,
        "consumer": consumer.name,
        "run_id": export.run_id,
        "layers": list(export.samples.layers),
        "layer_ids": list(ids_of(export, to).values()),
        "context_size": export.context_size,
        **({"last_state": NORMED} if export.samples.is_normed else {}),
    }


# -- what may be missing ----------------------------------------------------------------------------------------------


def _token_problems(job: JobRecord) -> list[M2rayError]:
    if job.selection.is_all:
        return []
    return [NotInRunError(f"The run kept {job.selection}: trainers read whole sequences.", 'Extract with tokens = "all".')]


def _run_problems(catalogue: Catalogue) -> list[M2rayError]:
    if catalogue.summary is not None:
        return []
    return [
        NotInRunError(
            f"The run at {catalogue.store.url} is not finished: an export is of a whole run.", "Run the same extract command again first."
        )
    ]


def _layer_problems(catalogue: Catalogue, consumer: Consumer, layers: Sequence[int], of_run: Sequence[int]) -> list[M2rayError]:
    problems: list[M2rayError] = []
    shown = ", ".join(map(str, layers))  # in their order, and doubled ones too
    if not layers and not of_run:
        problems.append(
            NotInRunError(f"The run at {catalogue.store.url} keeps no rows of the residual.", "Extract some: trainers read those.")
        )
    elif not layers:
        has = in_ranges(of_run)
        problems.append(ConfigError(f"{consumer.name} names no layers, and the run has several: {has}.", "Say which (--layers)."))
    if len(set(layers)) < len(layers):
        what = f"Of a model of {catalogue.job.model.num_layers} layers those that {consumer.name} takes by default are not different ones: {shown}."
        problems.append(ConfigError(what, "Name others (--layers)."))
    if absent := [layer for layer in layers if layer not in of_run]:
        problems.append(absent_layers(catalogue, absent))
    last = catalogue.job.model.num_layers - 1
    if consumer.needs_last and list(layers[-1:]) != [last]:
        what = f"{consumer.name} reads the states of the model's last layer, {last}, behind those of the others; the layers are {shown}."
        problems.append(ConfigError(what, f"Let --layers end with {last}."))
    elif consumer.needs_last and len(layers) == 1:
        what = f"{consumer.name} reads the states of other layers before those of the last one; the only layer is {shown}."
        problems.append(ConfigError(what, "Name others before it (--layers)."))
    return problems


def _option_problems(
    consumer: Consumer, to: str, context_size: int | None, model_folder: str | None, *, has_norm: bool
) -> list[M2rayError]:
    problems: list[M2rayError] = []
    if consumer.needs_context_size and not 0 < (context_size or 0) < _MOST_TOKENS:
        problems.append(ConfigError(f"{consumer.name} reads contexts of one length.", "Say how many tokens: --context-size."))
    if context_size is not None and not consumer.needs_context_size:
        problems.append(ConfigError(f"context_size is not an option of the export to {to}.", "Leave it out: whole sequences are written."))
    lacks = ["the normed last state, which is made from the last residual"] if consumer.needs_norm and not has_norm else []
    lacks += ["weights of the model"] if consumer.needs_model else []
    if lacks and model_folder is None:
        problems.append(ConfigError(f"{consumer.name} reads {' and '.join(lacks)}.", "Say where the run's model is: --model FOLDER."))
    return problems


def _row_problems(job: JobRecord, consumer: Consumer, samples: Samples) -> list[M2rayError]:
    problems: list[M2rayError] = []
    if samples.dtype not in consumer.dtypes:
        problems.append(
            NotInRunError(
                f"The run's rows are {samples.dtype}; {consumer.name} reads {' or '.join(consumer.dtypes)}.",
                f"Extract them with store_dtype = {consumer.dtypes[0]!r}.",
            )
        )
    if consumer.needs_last and samples.width != job.model.hidden_size:
        what = f"The run's rows hold {samples.width} numbers, several streams of {job.model.hidden_size}; {consumer.name} reads one."
        problems.append(NotInRunError(what, "Read the run itself."))
    return problems


def _mask_problems(catalogue: Catalogue, samples: Samples) -> list[M2rayError]:
    lacking = samples.without_mask()
    if not len(lacking):
        return []
    shown = ", ".join(map(str, lacking[:_SHOWN_SEQUENCES].tolist())) + (" ..." if len(lacking) > _SHOWN_SEQUENCES else "")
    return [
        NotInRunError(
            f"{len(lacking):,} of the {len(samples):,} sequences of the run at {catalogue.store.url} have no loss mask: {shown}.",
            'Extract them from chats with mask = "assistant", or from token ids with a loss_mask column.',
        )
    ]
