"""The main path: from a configuration to a finished run. Read `extract` first."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

from m2ray import __version__
from m2ray.activations.job import Counts, JobRecord, ModelFacts, read_job, require_same
from m2ray.activations.statistics import FOLDER, read_statistics_record
from m2ray.activations.writing.commits import Run, RunSummary, claim_run, go_on_with
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import MicroBatch, PromptStats, Shard
from m2ray.chain.actor import Job
from m2ray.chain.actors import Actors, ActorsOfChain
from m2ray.chain.checking import Inputs, check, look
from m2ray.chain.driver import Chain
from m2ray.chain.here import ActorsHere, hardware_here
from m2ray.chain.joining import cluster
from m2ray.chain.loading import absolute
from m2ray.chain.metrics import Metrics
from m2ray.chain.monitor import Monitor
from m2ray.chain.placement import reserve
from m2ray.chain.probing import Hardware, probe_hardware, require_versions
from m2ray.chain.progress import Progress
from m2ray.chain.replicas import Replicas
from m2ray.chain.report import REPORT, build_report, start_lines, summary_lines
from m2ray.chain.specs import stage_specs
from m2ray.chain.stages import Stages
from m2ray.chain.stopping import GOES_ON, NOTHING_WRITTEN, Stop, stop_on_sigterm
from m2ray.chain.warm import Standing, find, require_cluster
from m2ray.config import ExtractConfig
from m2ray.errors import M2rayError, RunConflictError, shown
from m2ray.hub import located, name_of
from m2ray.model.capture import CaptureSpec
from m2ray.model.digests import BARE_LAST_LAYER
from m2ray.model.stage import StageSpec
from m2ray.options import RunOptions
from m2ray.planning.plan import Plan, plan_run
from m2ray.prompts import Survey, TokenSpool, batching, estimated_batching, load_shards, micro_batches, respool, survey
from m2ray.prompts.in_memory import name_in_memory
from m2ray.storage import no_empty_folders


def extract(config: ExtractConfig, progress: Progress) -> RunSummary:
    """Extract what `config` asks for, or what is missing of it. Safe to repeat after a kill at any point.

    Raises:
        M2rayError: before Ray is started for bad configuration, checkpoint, prompts or output, or another driver at the run; before anything is written for a
            cluster that does not hold the plan; later for what fails there; at any time for SIGTERM.
    """
    config = absolute(located(config))
    with stop_on_sigterm() as stop, no_empty_folders(config.output), ExitStack() as stack:
        standing = _standing(config, stack, stop, progress)
        inputs = check(standing.agreed(config) if standing else config, stack, stop, progress)
        known = standing.hardware_for(inputs) if standing else None
        work = (_resume if inputs.recorded else _begin)(inputs, stack, stop, progress, known)
        if work.hardware is not None:
            _run(work, work.hardware, stop, progress)
        return _finish(work, progress)


@dataclass(frozen=True)
class _Work:
    """A claimed run, all its shards, the missing ones, their token ids, and the hardware to extract them on; None where nothing is missing."""

    inputs: Inputs
    run: Run
    shards: Sequence[Shard]
    missing: Sequence[Shard]
    tokens: TokenSpool
    hardware: Hardware | None


# -- beginning and going on -----------------------------------------------------------------------------------------------


def _begin(inputs: Inputs, stack: ExitStack, stop: Stop, progress: Progress, hardware: Hardware | None = None) -> _Work:
    """Survey the prompts, look at the hardware, and claim the run for what fits there."""
    found = None
    try:
        with stop.at_once(NOTHING_WRITTEN):
            shard_tokens, attempt = inputs.options.shard_tokens, uuid4().hex[:12]
            counting = partial(progress.surveying, counted=_counted(inputs))
            found = survey(inputs.source, inputs.tokenizer, inputs.store, attempt, shard_tokens, on_progress=counting)
            counting(found.num_sequences, is_done=True)
            stack.enter_context(found.tokens)
            hardware = hardware or _hardware(inputs, stack, progress)
            if not hardware.chain:
                inputs = inputs.on(hardware.cluster, found.shards.longest_tokens, partial(estimated_batching, found.shards))
            stats = batching(found.shards, inputs.options.batch_tokens)
            _plan(inputs, hardware, stats).require_fit()
    except M2rayError:
        if found is not None:  # no record names its files: job.json comes later
            _discard(inputs, found)
        raise
    run = _claim(inputs, found, stats, progress)
    if run is None:
        with stop.at_once(GOES_ON):
            inputs = look(inputs.config)
        return _resume(inputs, stack, stop, progress, hardware)
    return _Work(inputs, run, found.shards, run.missing(found.shards), found.tokens, hardware)


def _claim(inputs: Inputs, found: Survey, stats: PromptStats, progress: Progress) -> Run | None:
    """Create the run's record; None where another driver has created one by now, and this survey has been deleted.

    A request to create job.json may fail and have created it all the same, and it names the survey's files: they are deleted only where
    another record is seen in its place.
    """
    progress.say(
        f"{found.num_sequences:,} {_counted(inputs)}: {found.num_ready:,} ready with {found.num_tokens:,} tokens in {len(found.shards):,} shards, "
        f"{found.num_quarantined:,} quarantined; padding {stats.padding_waste:.1%}; {inputs.source.columns}"
    )
    for line in inputs.tokenizer.told(inputs.source.columns, found.first_prompt):
        progress.say(f"  {line}")
    if (kept := inputs.source.columns.kept).names:
        told = [f"{name} ({kind})" for name, kind in zip(kept.names, kept.types, strict=True)]
        progress.say(f"  kept beside them: {', '.join(told)}")
    if found.num_empty_masks:
        progress.say(f"  the loss masks of {found.num_empty_masks:,} prompts are 0 at every token")
    if found.num_without_rows:
        progress.say(f"  {found.num_without_rows:,} sequences have no chosen token, and so no row")
    for quarantined in found.first_quarantined:
        progress.say(f"  quarantined: {quarantined}")
    job = JobRecord.new(
        m2ray_version=__version__,
        options=inputs.options.row_options(),
        fingerprints={**inputs.fingerprints, "prompts": found.fingerprint},
        model=ModelFacts(inputs.checkpoint.whole_config.model_type, inputs.table.num_layers, inputs.table.hidden_size),
        parts=inputs.options.parts,
        num_shards=len(found.shards),
        counts=_counts(found),
        sequence_files=found.sequence_files,
        names={
            name: name_in_memory(name_of(given))
            for name in ("model", "prompts", "chat_template")
            if (given := getattr(inputs.config, name)) is not None
        },
    )
    try:
        run = claim_run(inputs.store, job)
    except RunConflictError:
        _discard(inputs, found)
        theirs = read_job(inputs.store)
        if theirs is None or theirs.options.get("template_date") == job.options["template_date"]:
            raise
        return None  # another driver began the run before midnight: its templates saw another day
    if run.job.run_id == job.run_id:
        return run
    _discard(inputs, found)
    return None


def _counted(inputs: Inputs) -> str:
    """What a survey counts. Packed prompts give contexts, documents that cannot be used, and a remainder."""
    return "prompts" if inputs.options.prompts.pack is None else "sequences of packed prompts"


def _counts(found: Survey) -> Counts:
    return Counts(
        sequences=found.num_sequences,
        ready=found.num_ready,
        quarantined=found.num_quarantined,
        tokens=found.num_tokens,
        rows=found.shards.num_rows,
        without_rows=found.num_without_rows,
    )


def _discard(inputs: Inputs, found: Survey) -> None:
    """Delete the files of a survey that no record names."""
    inputs.store.delete([file.key for file in found.sequence_files])


def _resume(inputs: Inputs, stack: ExitStack, stop: Stop, progress: Progress, hardware: Hardware | None = None) -> _Work:
    """Go on with a run: its shards as they were fixed, and the missing ones' prompts tokenised again."""
    with stop.at_once(GOES_ON):
        store, recorded = inputs.store, inputs.recorded
        assert recorded is not None, "there is a run to go on with"
        require_same(store, recorded, inputs.options.row_options(), {**inputs.fingerprints, "prompts": inputs.source.fingerprint()})
        shards = load_shards(store, recorded.sequence_files)
        run = go_on_with(store, recorded)
        if damaged := run.reopen_damaged():
            progress.say(f"Of {len(damaged):,} committed shards a part is gone or has another size: they are extracted again.")
        missing = run.missing(shards)
        progress.say(f"Going on with the run of {recorded.created_at}: {len(missing):,} of {len(shards):,} shards are missing.")
        counting = partial(progress.surveying, counted=_counted(inputs))
        tokens = respool(inputs.source, inputs.tokenizer, missing, store, recorded.sequence_files, on_progress=counting)
        stack.enter_context(tokens)
        if missing:
            counting(recorded.counts.sequences, is_done=True)
            hardware = hardware or _hardware(inputs, stack, progress)
            if not hardware.chain:
                inputs = inputs.on(hardware.cluster, max(int(shard.token_counts.max()) for shard in missing))
        return _Work(inputs, run, shards, missing, tokens, hardware if missing else None)


def _standing(config: ExtractConfig, stack: ExitStack, stop: Stop, progress: Progress) -> Standing | None:
    """The chain that the configuration names, which stands already; None where it names none."""
    if config.chain is None:
        return None
    with stop.at_once(GOES_ON):
        require_cluster()
        stack.enter_context(cluster(config.placement_timeout_s, progress.say))
        standing = find(config.chain)
        stack.enter_context(standing.expecting())
        return standing


def _plan(inputs: Inputs, hardware: Hardware, stats: PromptStats) -> Plan:
    if hardware.chain:
        return hardware.chain.plan(inputs, stats)
    return plan_run(inputs.demand(stats.longest_tokens), hardware.cluster, stats)


def _hardware(inputs: Inputs, stack: ExitStack, progress: Progress) -> Hardware:
    """This machine alone where that suffices. Else join or start the cluster until the stack ends, and look at its nodes, whose versions must be
    the driver's.
    """
    options = inputs.options
    if alone := hardware_here(inputs.config, options.watched_folder, stack):
        return alone
    progress.waiting("cluster", "joining Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray on this machine")
    stack.enter_context(cluster(options.placement_timeout_s, progress.say))
    hardware = probe_hardware(options.node_labels, options.watched_folder)
    require_versions(hardware.cluster)
    return hardware


def _finish(work: _Work, progress: Progress) -> RunSummary:
    """Close the account, or look whether it is closed."""
    summary = work.run.finish()
    progress.say(
        f"Complete: {summary.committed:,} sequences with {summary.tokens:,} tokens{_rows_said(work, summary)} "
        f"in {summary.parts:,} files, {summary.num_bytes:,} bytes; "
        f"{summary.quarantined:,} quarantined. {work.inputs.store.url}"
    )
    if taken := read_statistics_record(work.inputs.store, work.run.job):
        num_bytes = sum(file.num_bytes for file in taken.files)
        progress.say(
            f"Statistics of {taken.rows:,} rows of each site and layer: {len(taken.files):,} files below {FOLDER}/, {num_bytes:,} bytes"
        )
    return summary


def _rows_said(work: _Work, summary: RunSummary) -> str:
    """Nothing where each token has a row."""
    if work.run.job.selection.is_all:
        return ""
    without = f", none of {summary.without_rows:,} sequences" if summary.without_rows else ""
    return f" and {summary.rows:,} rows a layer{without},"


# -- extracting -----------------------------------------------------------------------------------------------------------


def _run(work: _Work, hardware: Hardware, stop: Stop, progress: Progress) -> None:
    """Plan, reserve room, run the chains, commit each shard as it completes, and report."""
    options = work.inputs.options
    stats = batching(work.missing, options.batch_tokens)
    wanted = _plan(work.inputs, hardware, stats)
    wanted.require_fit(has_begun=True)
    with ExitStack() as stack:
        with stop.at_once(GOES_ON):
            plan, actors = stack.enter_context(_actors(work, wanted, hardware, stop, progress))
        for line in start_lines(plan):
            progress.say(line)
        batches_of = _micro_batches_of(work)
        chains = [(_chain(plan, stages, batches_of, progress), stages) for stages in _stages(work, plan, hardware, actors)]
        computed_on = hardware.cluster.kinds(of_gpus=bool(plan.gpus))
        monitor = Monitor(plan, chains, work.shards, work.missing, progress, work.run.job.counts.quarantined)
        if not hardware.is_here:  # Ray's agents hand them on
            stack.enter_context(Metrics(_label(work), monitor.status))
        with closing(Replicas(chains, work.missing, stop, progress.say).results(monitor.tick)) as results:
            for result in results:
                work.run.commit(result.shard, result.attempt, result.receipts, result.micro_batches, result.elapsed_s, computed_on)
                monitor.committed(result.shard, result.receipts)
            measured = monitor.status()
        for line in summary_lines(plan, measured):
            progress.say(line)
        work.inputs.store.put(REPORT, json.dumps(build_report(plan, work.run.job.run_id, measured), indent=2).encode())


def _label(work: _Work) -> str:
    """What the metrics call the run: its folder's name, and enough of its id to tell it from another one's of that name."""
    folder = work.inputs.store.url.partition("?")[0].rstrip("/").rpartition("/")[2]
    return f"{shown(folder)}-{work.run.job.run_id[:6]}"


@contextmanager
def _actors(
    work: _Work, wanted: Plan, hardware: Hardware, stop: Stop, progress: Progress
) -> Iterator[tuple[Plan, list[tuple[list[list[StageSpec]], ActorsOfChain, int]]]]:
    """The plan as it comes to lie, and for each replica what its stages hold, their actors and the epoch: of a chain that stands, or new ones."""
    if hardware.chain:
        with hardware.chain.lent(_label(work), stop, progress) as lent:
            yield wanted, [lent]
        return
    options, inputs = wanted.demand.options, work.inputs
    if hardware.is_here:
        specs = list(stage_specs(wanted, 0, inputs.config.model, inputs.checkpoint.digests))
        yield wanted, [(specs, ActorsHere(specs, options.stage_timeout_s), 0)]
        return
    with reserve(wanted, hardware, options.placement_timeout_s) as (plan, reservations):
        found: list[tuple[list[list[StageSpec]], ActorsOfChain, int]] = []
        for replica, reservation in enumerate(reservations):
            specs = list(stage_specs(plan, replica, inputs.config.model, inputs.checkpoint.digests))
            found.append((specs, Actors(specs, reservation, options.transport, options.stage_timeout_s, options.placement_timeout_s), 0))
        yield plan, found


def _stages(
    work: _Work, plan: Plan, hardware: Hardware, actors: Sequence[tuple[list[list[StageSpec]], ActorsOfChain, int]]
) -> Iterator[Stages]:
    """The stages of each replica, with their job."""
    options = plan.demand.options
    per_stage_cpus = sum(hardware.cpus.values()) / len(plan.stages)
    writer = WriterSpec(
        output=work.inputs.store.url,
        run_metadata=work.run.job.run_metadata(),
        queue_bytes=options.writer_queue_bytes,
        threads=max(1, int(per_stage_cpus / 2)) if plan.gpus else 1,
        compression=options.compression,
        selection=options.prompts.selection,
    )
    job, num_layers = Job(_capture(options), writer, options.batch_tokens), plan.demand.num_layers

    def hold(loaded: Mapping[int | None, str]) -> None:
        """A chain that stands may have more layers than the run, and the final norm where the run does not take it."""
        of_the_run = {layer: digest for layer, digest in loaded.items() if layer is None or 0 <= layer < num_layers}
        if BARE_LAST_LAYER in loaded and not plan.demand.with_final_norm and num_layers not in loaded:
            of_the_run[num_layers - 1] = loaded[BARE_LAST_LAYER]
        hold_weights(work.inputs.store, work.run.job, of_the_run)

    for specs, of_chain, epoch in actors:
        stages = Stages(specs, of_chain, timeout_s=options.stage_timeout_s, hold_weights=hold, epoch=epoch)
        stages.begin(job)
        yield stages


def _capture(options: RunOptions) -> CaptureSpec:
    """What the stages take: rows of the sites, unless statistics alone are kept, and statistics."""
    kept = {} if options.keep == "statistics" else options.sites
    return CaptureSpec(kept, options.store_dtype, options.prompts.selection, options.statistics)


def _chain(plan: Plan, stages: Stages, micro_batches_of: Callable[[Shard, int], Iterator[MicroBatch]], progress: Progress) -> Chain:
    options = plan.demand.options
    return Chain(
        stages,
        micro_batches_of,
        options.batch_tokens,
        progress.say,
        in_flight_bytes=options.in_flight_bytes,
        hidden_bytes=plan.demand.table.handed_bytes(plan.demand.itemsize_bytes),
        timeout_s=options.stage_timeout_s,
    )


def _micro_batches_of(work: _Work) -> Callable[[Shard, int], Iterator[MicroBatch]]:
    """A shard's micro-batches. The spool is one file, and replicas read it from several threads: one shard at a time."""
    lock = threading.Lock()

    def batches(shard: Shard, batch_tokens: int) -> Iterator[MicroBatch]:
        with lock:
            return iter(list(micro_batches(shard, work.tokens, batch_tokens)))

    return batches
