"""The main path: from a configuration to a finished run. Read `extract` first."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from uuid import uuid4

from m2ray import __version__
from m2ray.activations.commits import Run, RunSummary, claim_run
from m2ray.activations.job import Counts, JobRecord, ModelFacts, read_job, require_same
from m2ray.activations.lease import held
from m2ray.batches import LayerSpan, MicroBatch, PartSpec, Shard
from m2ray.chain.checking import Inputs, check
from m2ray.chain.driver import Chain, ChainLimits
from m2ray.chain.joining import cluster
from m2ray.chain.loading import WriterSpec
from m2ray.chain.monitor import Monitor
from m2ray.chain.placement import Reservation, reserve
from m2ray.chain.probing import Hardware, probe_hardware
from m2ray.chain.progress import Progress
from m2ray.chain.replicas import Replicas
from m2ray.chain.report import REPORT, RunMeasured, build_report, start_lines, summary_lines
from m2ray.chain.stages import Patience, Stages
from m2ray.chain.stopping import GOES_ON, NOTHING_WRITTEN, Stop, stop_on_sigterm
from m2ray.config import ExtractConfig, parse_labels
from m2ray.errors import M2rayError, RunConflictError
from m2ray.model.offload import Offload
from m2ray.model.stage import StageSpec
from m2ray.planning.batch_size import AUTO_BATCH_TOKENS, best_batch_tokens
from m2ray.planning.demand import Demand
from m2ray.planning.memory import window
from m2ray.planning.output import PromptStats
from m2ray.planning.plan import Plan, most_batch_tokens, most_replicas, plan_run
from m2ray.planning.probe import offload_folder, probed_folder
from m2ray.planning.spill import Spill
from m2ray.prompts import ShardTable, Survey, TokenSpool, batching, load_shards, micro_batches, respool, survey

_JUDGED_SHARDS = 64
"""Of a large run, for the size of its micro-batches: cutting all of them takes seconds a size."""


def extract(config: ExtractConfig, progress: Progress) -> RunSummary:
    """Extract what `config` asks for, or what is missing of it. Safe to repeat after a kill at any point.

    Raises:
        M2rayError: before Ray is started for bad configuration, checkpoint, prompts or output, or another driver at the run; before anything is written for a
            cluster that does not hold the plan; later for what fails there; at any time for SIGTERM.
    """
    with stop_on_sigterm() as stop, ExitStack() as stack:
        with stop.at_once(GOES_ON):
            inputs = check(config)
            if stack.enter_context(held(inputs.store, progress.say, stop.outlived, wait=config.wait)):
                inputs = check(config)  # what another driver began meanwhile
            recorded = read_job(inputs.store)
        if recorded:
            with stop.at_once(GOES_ON):
                work, hardware = _resume(inputs, recorded, progress), None
        else:
            inputs, work, hardware = _begin(inputs, stack, stop, progress)
        stack.enter_context(work.tokens)
        missing = work.run.missing(work.shards)
        if missing and hardware is None:
            with stop.at_once(GOES_ON):
                hardware = stack.enter_context(_hardware(config))
        if hardware is not None and missing:
            _extract_missing(inputs, work, missing, hardware, stop, progress)
        summary = work.run.finish()
    progress.say(
        f"Complete: {summary.committed:,} sequences with {summary.tokens:,} tokens in {summary.parts:,} files, {summary.num_bytes:,} bytes; "
        f"{summary.quarantined:,} quarantined. {inputs.store.url}"
    )
    return summary


@dataclass(frozen=True)
class _Work:
    """A claimed run, all its shards, and the token ids of those not committed."""

    run: Run
    shards: Sequence[Shard]
    tokens: TokenSpool


# -- what the hardware decides --------------------------------------------------------------------------------------------


@contextmanager
def _hardware(config: ExtractConfig) -> Iterator[Hardware]:
    """Join or start the cluster and look at its nodes."""
    with cluster(config.placement_timeout_s):
        yield probe_hardware(parse_labels(config.node_labels), probed_folder(config))


def _resolve(inputs: Inputs, shards: ShardTable, hardware: Hardware) -> Inputs:
    """Set the options of a new run that are "auto" until the GPUs are known, and refuse a cluster that does not hold the model."""
    options = dict(inputs.options)
    if options["compile"] == "auto":
        options["compile"] = hardware.cluster.num_gpus > 0
    demand = _demand(replace(inputs, options=options), hardware, shards.longest_tokens)
    if options["batch_tokens"] == "auto":
        options["batch_tokens"] = _auto_batch_tokens(demand, shards, hardware)
    plan_run(demand.with_batch_tokens(options["batch_tokens"]), hardware.cluster).require_fit()
    return replace(inputs, options=options)


def _auto_batch_tokens(demand: Demand, shards: ShardTable, hardware: Hardware) -> int:
    """What memory has room for and takes least time, judged by some of the shards; the most there is where nothing fits."""
    most_tokens = most_batch_tokens(demand, hardware.cluster, AUTO_BATCH_TOKENS)
    if most_tokens is None:
        return AUTO_BATCH_TOKENS
    plan = plan_run(demand.with_batch_tokens(most_tokens), hardware.cluster)
    replicas = demand.options.chains.replicas
    step = max(1, len(shards) // _JUDGED_SHARDS)

    def stats_at(batch_tokens: int) -> PromptStats:
        found = batching(shards[::step], batch_tokens)
        share = step / replicas
        return PromptStats(0, 0, int(found.padded_tokens * share), found.longest_tokens, 0, int(found.micro_batches * share))

    return best_batch_tokens(most_tokens, stats_at, len(plan.stages) // replicas)


def _demand(inputs: Inputs, hardware: Hardware, longest_tokens: int | None) -> Demand:
    demand = inputs.demand(longest_tokens)
    return demand.with_replicas(most_replicas(demand, hardware.cluster)) if inputs.config.replicas == "auto" else demand


# -- beginning and going on -----------------------------------------------------------------------------------------------


def _begin(inputs: Inputs, stack: ExitStack, stop: Stop, progress: Progress) -> tuple[Inputs, _Work, Hardware]:
    """Survey the prompts, look at the hardware, and claim the run for what fits there."""
    shard_tokens, found = inputs.options["shard_tokens"], None
    try:
        with stop.at_once(NOTHING_WRITTEN):
            found = survey(inputs.source, inputs.tokenizer, inputs.store, uuid4().hex[:12], shard_tokens, on_progress=progress.surveying)
            hardware = stack.enter_context(_hardware(inputs.config))
            inputs = _resolve(inputs, found.shards, hardware)
    except M2rayError:
        if found is not None:  # no record names its files: job.json comes later
            _discard(inputs, found)
        raise
    return inputs, _claim(inputs, found, progress), hardware


def _claim(inputs: Inputs, found: Survey, progress: Progress) -> _Work:
    """Create the run's record, or go on with the one that another driver created by now: by its survey, not by this one.

    Once job.json was asked for it may be there, whatever the answer says, and names the survey's files: they are deleted only where
    another record is seen in its place.
    """
    waste = batching(found.shards, inputs.options["batch_tokens"]).padding_waste
    progress.say(
        f"{found.num_sequences:,} prompts: {found.num_ready:,} ready with {found.num_tokens:,} tokens in {len(found.shards):,} shards, "
        f"{found.num_quarantined:,} quarantined; padding {waste:.1%}"
    )
    for quarantined in found.first_quarantined:
        progress.say(f"  quarantined: {quarantined}")
    config = inputs.checkpoint.config
    job = JobRecord.new(
        m2ray_version=__version__,
        options=inputs.options,
        fingerprints={**inputs.fingerprints, "prompts": found.fingerprint},
        model=ModelFacts(config.model_type, inputs.table.num_layers, inputs.table.hidden_size),
        parts=tuple(
            PartSpec(inputs.options["sites"], layer, inputs.options["store_dtype"], inputs.table.hidden_size) for layer in inputs.layers
        ),
        num_shards=len(found.shards),
        counts=Counts(found.num_sequences, found.num_ready, found.num_quarantined, found.num_tokens),
        sequence_files=found.sequence_files,
    )
    try:
        run = claim_run(inputs.store, job)
    except RunConflictError:
        _discard(inputs, found)
        raise
    if run.job.run_id == job.run_id:
        return _Work(run, found.shards, found.tokens)
    _discard(inputs, found)
    return _resume(inputs, run.job, progress)


def _discard(inputs: Inputs, found: Survey) -> None:
    """Delete the files of a survey that no record names."""
    found.tokens.close()
    inputs.store.delete([file.key for file in found.sequence_files])


def _resume(inputs: Inputs, recorded: JobRecord, progress: Progress) -> _Work:
    """Go on with a run: its shards as they were fixed, and the missing ones' prompts tokenised again."""
    require_same(inputs.store, recorded, inputs.options, {**inputs.fingerprints, "prompts": inputs.source.fingerprint()})
    shards = load_shards(inputs.store, recorded.sequence_files)
    run = claim_run(inputs.store, recorded)
    damaged = run.reopen_damaged()
    if damaged:
        progress.say(f"Of {len(damaged):,} committed shards a part is gone or has another size: they are extracted anew.")
    missing = run.missing(shards)
    progress.say(f"Going on with the run of {recorded.created_at}: {len(missing):,} of {len(shards):,} shards are missing.")
    tokens = respool(inputs.source, inputs.tokenizer, missing, inputs.store, recorded.sequence_files, on_progress=progress.surveying)
    return _Work(run, shards, tokens)


# -- extracting -----------------------------------------------------------------------------------------------------------


def _extract_missing(inputs: Inputs, work: _Work, missing: Sequence[Shard], hardware: Hardware, stop: Stop, progress: Progress) -> None:
    """Plan, reserve room, run the chains, commit each shard as it completes, and report."""
    config = inputs.config
    stats = PromptStats(sum(len(shard.sequence_ids) for shard in missing), *batching(missing, inputs.options["batch_tokens"]))
    wanted = plan_run(_demand(inputs, hardware, stats.longest_tokens), hardware.cluster, stats)
    wanted.require_fit()
    with ExitStack() as stack:
        with stop.at_once(GOES_ON):
            plan, reservations = stack.enter_context(reserve(wanted, hardware, config.placement_timeout_s))
        for line in start_lines(plan):
            progress.say(line)
        batches_of = _micro_batches_of(work)
        chains = [
            (Chain(stages, _limits(inputs, plan), batches_of, inputs.options["batch_tokens"], progress.say), stages)
            for stages in _stages(inputs, work, plan, hardware, reservations)
        ]
        monitor = Monitor(plan, chains, work.shards, missing, progress)
        with closing(Replicas(chains, missing, stop, progress.say).results(monitor.tick)) as results:
            for result in results:
                work.run.commit(result.shard, result.attempt, result.receipts, result.micro_batches, result.elapsed_s)
                monitor.committed(result.receipts)
            measured = RunMeasured(work.run.job.run_id, *monitor.measured())
        for line in summary_lines(plan, measured):
            progress.say(line)
        inputs.store.put(REPORT, json.dumps(build_report(plan, measured), indent=2).encode())


def _stages(inputs: Inputs, work: _Work, plan: Plan, hardware: Hardware, reservations: Sequence[Reservation]) -> Iterator[Stages]:
    """The stages of each replica, not yet started."""
    config = inputs.config
    per_stage_cpus = sum(hardware.cpus.values()) / len(plan.stages)
    writer = WriterSpec(
        output=inputs.store.url,
        run_metadata=work.run.job.run_metadata(),
        queue_bytes=plan.demand.options.writer_queue_bytes,
        threads=max(1, int(per_stage_cpus / 2)) if plan.gpus else 1,
        timeout_s=config.stage_timeout_s,
        batch_tokens=inputs.options["batch_tokens"],
        compression=config.compression,
    )
    patience = Patience(config.stage_timeout_s, config.placement_timeout_s)
    for replica, reservation in enumerate(reservations):
        specs = [list(_specs(inputs, plan, replica, stage.stage, stage.span)) for stage in plan.stages if stage.replica == replica]
        yield Stages(specs, writer, reservation, patience, window(len(specs)), config.transport)


def _specs(inputs: Inputs, plan: Plan, replica: int, stage: int, span: LayerSpan) -> Iterator[StageSpec]:
    """What each device of a stage holds. `cuda:N` counts the GPUs that the stage's process sees, in the order of the plan."""
    options = inputs.options
    gpus = [gpu for gpu in plan.gpus if (gpu.replica, gpu.stage) == (replica, stage)]
    spans = [(f"cuda:{number}", gpu.span, gpu.spill) for number, gpu in enumerate(gpus) if gpu.span is not None] or [("cpu", span, Spill())]
    for device, on_device, spilt in spans:
        yield StageSpec(
            model_url=inputs.config.model,
            span=on_device,
            capture_layers=tuple(layer for layer in inputs.layers if layer in on_device),
            sites=(options["sites"],),
            compute_dtype=options["compute_dtype"],
            store_dtype=options["store_dtype"],
            attn_implementation=options["attn_implementation"],
            device=device,
            threads=options["threads_per_stage"],
            compile=options["compile"],
            offload=Offload(_layers(spilt.in_host), _layers(spilt.on_disk), offload_folder(inputs.config)),
        )


def _layers(span: LayerSpan | None) -> tuple[int, ...]:
    return tuple(range(span.start, span.stop)) if span else ()


def _limits(inputs: Inputs, plan: Plan) -> ChainLimits:
    demand = plan.demand
    return ChainLimits(demand.options.in_flight_bytes, inputs.table.hidden_size, demand.itemsize_bytes, inputs.config.stage_timeout_s)


def _micro_batches_of(work: _Work) -> Callable[[Shard, int], Iterator[MicroBatch]]:
    """A shard's micro-batches. The spool is one file, and replicas read it from several threads: one shard at a time."""
    lock = threading.Lock()

    def batches(shard: Shard, batch_tokens: int) -> Iterator[MicroBatch]:
        with lock:
            return iter(list(micro_batches(shard, work.tokens, batch_tokens)))

    return batches
