"""The main path: from a configuration to a finished run. Read `extract` first."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager

from m2ray.activations.records import read_weights
from m2ray.activations.statistics import FOLDER, read_statistics_record
from m2ray.activations.writing.commits import RunSummary
from m2ray.activations.writing.weights_record import hold_weights, require_weights
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import MicroBatch, Shard
from m2ray.chain.actors import Actors, ActorsOfChain
from m2ray.chain.beginning import Work, begin, plan_of, resume
from m2ray.chain.checking import check
from m2ray.chain.driver import Chain
from m2ray.chain.here import ActorsHere
from m2ray.chain.job import Job
from m2ray.chain.joining import cluster, require_cluster
from m2ray.chain.loading import absolute
from m2ray.chain.metrics import Metrics
from m2ray.chain.monitor import Monitor
from m2ray.chain.placement import reserve
from m2ray.chain.probing import Hardware
from m2ray.chain.progress import Progress
from m2ray.chain.replicas import Replicas
from m2ray.chain.report import REPORT, build_report, start_lines, summary_lines
from m2ray.chain.specs import stage_specs
from m2ray.chain.stages import Stages
from m2ray.chain.stopping import GOES_ON, NOTHING_YET, Stop, stop_on_sigterm
from m2ray.chain.warm import Standing, find
from m2ray.config import ExtractConfig
from m2ray.errors import shown
from m2ray.hub import located
from m2ray.model.capture import CaptureSpec
from m2ray.model.digests import of_run
from m2ray.model.known_weights import known_weights
from m2ray.model.stage import StageSpec
from m2ray.model.weights import hash_weights
from m2ray.options import RunOptions
from m2ray.planning.plan import Plan
from m2ray.prompts import batching, micro_batches
from m2ray.storage import no_empty_folders


def extract(config: ExtractConfig, progress: Progress) -> RunSummary:
    """Extract what `config` asks for, or what is missing of it. Safe to repeat after a kill at any point.

    Raises:
        M2rayError: before Ray is started for bad configuration, checkpoint, columns of prompts or output, or another driver at the run; before anything is
            written for prompts of which no row can be used, and a cluster that does not hold the plan; later for what fails there; at any time for SIGTERM.
    """
    config = absolute(located(config))
    with stop_on_sigterm() as stop, no_empty_folders(config.output), ExitStack() as stack:
        standing = _standing(config, stack, stop, progress)
        inputs = check(standing.agreed(config) if standing else config, stack, stop, progress)
        known = None
        if standing:
            with stop.at_once(GOES_ON if inputs.recorded else NOTHING_YET):
                known = standing.hardware_for(inputs, progress)
        work = (resume if inputs.recorded else begin)(inputs, stack, stop, progress, known)
        if work.hardware is not None:
            _run(work, work.hardware, stop, progress)
        else:
            with stop.at_once(GOES_ON):
                _hold_model(work, progress)
        return _finish(work, progress)


def _standing(config: ExtractConfig, stack: ExitStack, stop: Stop, progress: Progress) -> Standing | None:
    """The chain that the configuration names, which stands already; None where it names none."""
    if config.chain is None:
        return None
    with stop.at_once(NOTHING_YET):
        require_cluster()
        stack.enter_context(cluster(config.placement_timeout_s, progress.say))
        standing = find(config.chain)
        stack.enter_context(standing.expecting())
        return standing


def _hold_model(work: Work, progress: Progress) -> None:
    """Refuse another model's weights where nothing is missing, and so nothing loads them. Of files that are as they were when the run began the
    embedding and the last layer that it needs are read, of others all.
    """
    job, inputs = work.run.job, work.inputs
    progress.waiting("check", "nothing is missing: whether the run's weights are those of the model")
    began_with = read_weights(inputs.store, job).files
    are_as_they_were = all(began_with.get(file) == version for file, version in inputs.versions.items())
    hashed = hash_weights if are_as_they_were else known_weights
    require_weights(inputs.store, job, hashed(inputs.checkpoint, job.layers_run, with_final_norm=job.with_final_norm))


def _finish(work: Work, progress: Progress) -> RunSummary:
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


def _rows_said(work: Work, summary: RunSummary) -> str:
    """Nothing where each token has a row."""
    if work.run.job.selection.is_all:
        return ""
    without = f", none of {summary.without_rows:,} sequences" if summary.without_rows else ""
    return f" and {summary.rows:,} rows a layer{without},"


# -- extracting -----------------------------------------------------------------------------------------------------------


def _run(work: Work, hardware: Hardware, stop: Stop, progress: Progress) -> None:
    """Plan, reserve room, run the chains, commit each shard as it completes, and report."""
    options = work.inputs.options
    stats = batching(work.missing, options.batch_tokens)
    wanted = plan_of(work.inputs, hardware, stats)
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


def _label(work: Work) -> str:
    """What the metrics call the run: its folder's name, and enough of its id to tell it from another one's of that name."""
    folder = work.inputs.store.url.partition("?")[0].rstrip("/").rpartition("/")[2]
    return f"{shown(folder)}-{work.run.job.run_id[:6]}"


@contextmanager
def _actors(
    work: Work, wanted: Plan, hardware: Hardware, stop: Stop, progress: Progress
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
    work: Work, plan: Plan, hardware: Hardware, actors: Sequence[tuple[list[list[StageSpec]], ActorsOfChain, int]]
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
        found = of_run(loaded, num_layers, with_final_norm=plan.demand.with_final_norm)
        hold_weights(work.inputs.store, work.run.job, found, work.inputs.versions)

    for specs, of_chain, epoch in actors:
        stages = Stages(specs, of_chain, timeout_s=options.stage_timeout_s, hold_weights=hold, epoch=epoch)
        stages.begin(job)
        yield stages


def _capture(options: RunOptions) -> CaptureSpec:
    """What the stages take: rows of the sites, unless statistics alone are kept, and statistics."""
    kept = {} if options.keep == "statistics" else options.sites
    return CaptureSpec(kept, options.store_dtype, options.prompts.selection, options.statistics, with_crcs=options.with_crcs)


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


def _micro_batches_of(work: Work) -> Callable[[Shard, int], Iterator[MicroBatch]]:
    """A shard's micro-batches. The spool is one file, and replicas read it from several threads: one shard at a time."""
    lock = threading.Lock()

    def batches(shard: Shard, batch_tokens: int) -> Iterator[MicroBatch]:
        with lock:
            return iter(list(micro_batches(shard, work.tokens, batch_tokens)))

    return batches
