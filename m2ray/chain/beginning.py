"""A run begun, or gone on with: its prompts surveyed, the hardware looked at, its record claimed."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

from m2ray import __version__
from m2ray.activations.job import Counts, JobRecord, ModelFacts, read_job
from m2ray.activations.resumable import require_same
from m2ray.activations.writing.commits import Run, claim_run, go_on_with
from m2ray.batches import PromptStats, Shard
from m2ray.chain.checking import Inputs, look
from m2ray.chain.here import hardware_here, needs_cluster
from m2ray.chain.joining import cluster, cluster_ahead, wait_for
from m2ray.chain.probing import Hardware, probe_hardware, require_versions
from m2ray.chain.progress import Progress
from m2ray.chain.stopping import GOES_ON, NOTHING_WRITTEN, Stop, undisturbed
from m2ray.errors import RunConflictError
from m2ray.hub import name_of
from m2ray.planning.plan import Plan, plan_run
from m2ray.prompts import Survey, TokenSpool, batching, estimated_batching, load_shards, respool, survey
from m2ray.prompts.in_memory import name_in_memory


@dataclass(frozen=True)
class Work:
    """A claimed run, all its shards, the missing ones, their token ids, and the hardware to extract them on; None where nothing is missing."""

    inputs: Inputs
    run: Run
    shards: Sequence[Shard]
    missing: Sequence[Shard]
    tokens: TokenSpool
    hardware: Hardware | None


def begin(inputs: Inputs, stack: ExitStack, stop: Stop, progress: Progress, hardware: Hardware | None = None) -> Work:
    """Survey the prompts, look at the hardware, and claim the run for what fits there. Whatever ends it before that leaves nothing."""
    with ExitStack() as undo:
        with stop.at_once(NOTHING_WRITTEN):
            shard_tokens, attempt = inputs.options.shard_tokens, uuid4().hex[:12]
            counting = partial(progress.surveying, counted=_counted(inputs))
            ahead = None if hardware else _ahead(inputs, stack, progress)
            found = survey(inputs.source, inputs.tokenizer, inputs.store, attempt, shard_tokens, on_progress=counting)
            undo.callback(_discard, inputs, found)  # no record names its files: job.json comes later
            counting(found.num_sequences, is_done=True)
            stack.enter_context(found.tokens)
            hardware = hardware or _hardware(inputs, stack, progress, ahead)
            if not hardware.chain:
                inputs = inputs.on(hardware.cluster, found.shards.longest_tokens, partial(estimated_batching, found.shards))
            stats = batching(found.shards, inputs.options.batch_tokens)
            plan_of(inputs, hardware, stats).require_fit()
        undo.pop_all()
    run = _claim(inputs, found, stats, progress)
    if run is None:
        with stop.at_once(GOES_ON):
            inputs = look(inputs.config)
        return resume(inputs, stack, stop, progress, hardware)
    return Work(inputs, run, found.shards, run.missing(found.shards), found.tokens, hardware)


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
    for line in _chosen(inputs):
        progress.say(f"  {line}")
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


def _chosen(inputs: Inputs) -> Iterator[str]:
    """What of the prompts the run takes, where options say so."""
    options, kept = inputs.options.prompts, inputs.source.columns.kept
    if options.limit is not None:
        yield f"limit = {options.limit:,}: prompts after the first {options.limit:,} are left out"
    if kept.names:
        yield f"kept in sequences/: {', '.join(f'{name} ({kind})' for name, kind in zip(kept.names, kept.types, strict=True))}"


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
    with undisturbed():
        inputs.store.delete([file.key for file in found.sequence_files])


def resume(inputs: Inputs, stack: ExitStack, stop: Stop, progress: Progress, hardware: Hardware | None = None) -> Work:
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
        ahead = _ahead(inputs, stack, progress) if missing and not hardware else None
        tokens = respool(inputs.source, inputs.tokenizer, missing, store, recorded.sequence_files, on_progress=counting)
        stack.enter_context(tokens)
        if missing:
            counting(recorded.counts.sequences, is_done=True)
            hardware = hardware or _hardware(inputs, stack, progress, ahead)
            if not hardware.chain:
                inputs = inputs.on(hardware.cluster, max(int(shard.token_counts.max()) for shard in missing))
        return Work(inputs, run, shards, missing, tokens, hardware if missing else None)


def plan_of(inputs: Inputs, hardware: Hardware, stats: PromptStats) -> Plan:
    """How the prompts are run there: on a chain that stands, or on one that is still to come."""
    if hardware.chain:
        return hardware.chain.plan(inputs, stats)
    return plan_run(inputs.demand(stats.longest_tokens), hardware.cluster, stats)


def _ahead(inputs: Inputs, stack: ExitStack, progress: Progress) -> Future[None] | None:
    """The cluster on its way, until the stack ends, while the prompts are read: where it is needed, and where reading does nothing to the whole
    process that a starting Ray would inherit (a limit of memory) or suffer from (a fork).
    """
    if not needs_cluster(inputs.config) or not inputs.source.may_be_read_ahead or inputs.source.columns.is_messages:
        return None
    return stack.enter_context(cluster_ahead(inputs.options.placement_timeout_s, progress.say))


def _hardware(inputs: Inputs, stack: ExitStack, progress: Progress, ahead: Future[None] | None) -> Hardware:
    """This machine alone where that suffices. Else join or start the cluster until the stack ends, or wait for one that is on its way, and look at
    its nodes, whose versions must be the driver's.
    """
    options = inputs.options
    if alone := hardware_here(inputs.config, options.watched_folder, stack):
        return alone
    progress.waiting("cluster", "joining Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray on this machine")
    if ahead is not None:
        wait_for(ahead)
    stack.enter_context(cluster(options.placement_timeout_s, progress.say))
    hardware = probe_hardware(options.node_labels, options.watched_folder)
    require_versions(hardware.cluster)
    return hardware
