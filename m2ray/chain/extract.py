"""The main path: from a configuration to a finished run. Read `extract` first."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from m2ray import __version__
from m2ray.activations.commits import Run, RunSummary, claim_run, read_summary
from m2ray.activations.job import Counts, JobRecord, ModelFacts, read_job, require_same
from m2ray.batches import LayerSpan, MicroBatch, PartSpec, Shard, TensorTable
from m2ray.chain.actor import WriterSpec
from m2ray.chain.driver import Chain, ChainLimits, window
from m2ray.chain.monitor import Monitor
from m2ray.chain.placement import ClusterSize, cluster, reserve
from m2ray.chain.progress import Progress
from m2ray.chain.replicas import Replicas
from m2ray.chain.stages import Patience, Stages
from m2ray.chain.stopping import stop_on_sigterm
from m2ray.config import ExtractConfig, parse_bytes, parse_layers
from m2ray.errors import ConfigError, M2rayError, RunConflictError, raise_all
from m2ray.model.checkpoint import Checkpoint, open_checkpoint, tensor_table
from m2ray.model.skeleton import resolve_attn_implementation
from m2ray.model.stage import StageSpec
from m2ray.planning.partition import partition
from m2ray.prompts import (
    PromptOptions,
    PromptSource,
    PromptTokenizer,
    TokenSpool,
    load_shards,
    micro_batches,
    padding_waste,
    respool,
    survey,
)
from m2ray.storage import Store, open_store

_AUTO_BATCH_TOKENS = 16_384
_AUTO_SHARD_TOKENS = 32_768
_WRITER_QUEUE_BYTES = 2 << 30
_ITEMSIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def extract(config: ExtractConfig, progress: Progress) -> RunSummary:
    """Extract what `config` asks for, or what is missing of it. Safe to repeat after a kill at any point.

    Raises:
        M2rayError: before Ray is started for bad configuration, checkpoint, prompts or output; later for what fails there.
    """
    inputs = _check(config)
    recorded = read_job(inputs.store)
    work = _resume(inputs, recorded, progress) if recorded else _begin(inputs, progress)
    with closing(work.tokens):
        missing = work.run.missing(work.shards)
        if missing:
            _extract_missing(inputs, work, missing, progress)
    summary = read_summary(inputs.store) if work.run.is_finished else None
    summary = summary or work.run.finish()
    progress.say(
        f"Complete: {summary.committed:,} sequences with {summary.tokens:,} tokens in {summary.parts:,} files, {summary.num_bytes:,} bytes; "
        f"{summary.quarantined:,} quarantined. {inputs.store.url}"
    )
    return summary


@dataclass(frozen=True)
class _Inputs:
    """Everything that is known before Ray is started. `options` are those that change rows, "auto" values resolved."""

    config: ExtractConfig
    checkpoint: Checkpoint
    table: TensorTable
    layers: tuple[int, ...]
    source: PromptSource
    tokenizer: PromptTokenizer
    store: Store
    options: dict[str, Any]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those that cost nothing to know; the prompts' is taken once their digest is needed."""
        return {
            "model": self.checkpoint.digest,
            "tokenizer": self.tokenizer.tokenizer_digest,
            "template": self.tokenizer.template_digest,
        }


@dataclass(frozen=True)
class _Work:
    """A claimed run, all its shards, and the token ids of those not committed."""

    run: Run
    shards: Sequence[Shard]
    tokens: TokenSpool


# -- before Ray -----------------------------------------------------------------------------------------------------------


def _check(config: ExtractConfig) -> _Inputs:
    """Look at checkpoint, layers, prompts, tokenizer and output. Raises all their problems at once."""
    parse_bytes(config.in_flight, "in_flight")
    store = open_store(config.output)
    problems: list[M2rayError] = []

    def look(*steps: Callable[[], Any]) -> list[Any]:
        """Take each step, keep its problem for later, and give what the successful ones found."""
        found = []
        for step in steps:
            try:
                found.append(step())
            except M2rayError as problem:
                problems.append(problem)
        return found

    look(store.probe)
    recorded = next(iter(look(lambda: read_job(store))), None)
    opened = look(lambda: open_checkpoint(config.model))
    limit = opened[0].config.max_position_embeddings if opened else 1
    prompts = PromptOptions(
        config.prompts, config.max_length or limit, config.text_column, config.messages_column, config.id_column, config.truncation
    )
    source = look(lambda: PromptSource.open(prompts))
    if not opened:
        raise_all(problems)
    checkpoint: Checkpoint = opened[0]
    look(checkpoint.check)
    layers = look(lambda: parse_layers(config.layers, checkpoint.config.num_hidden_layers))
    tokenizer = look(lambda: PromptTokenizer.load(config.model, prompts, checkpoint.config.vocab_size))
    attention = look(lambda: resolve_attn_implementation(checkpoint.config, config.attn_implementation))
    raise_all(problems)
    table = tensor_table(checkpoint)
    num_layers = layers[0][-1] + 1
    if isinstance(config.stages, int) and config.stages > num_layers:
        raise ConfigError(f"stages = {config.stages}, but only {num_layers} layers are run.", f"Ask for at most {num_layers}.")
    options = _resolved(config, layers[0], prompts.max_length, attention[0], recorded)
    return _Inputs(config, checkpoint, table, layers[0], source[0], tokenizer[0], store, options)


def _resolved(config: ExtractConfig, layers: Sequence[int], max_length: int, attention: str, recorded: JobRecord | None) -> dict[str, Any]:
    """The options that change rows, without "auto": a run that began keeps its values, a new one takes today's.

    The model and the prompts are left out: their digests say more than their paths.
    """
    options = config.model_dump(include=set(config.row_options()) - {"model", "prompts"})
    options |= {"layers": list(layers), "max_length": max_length}
    automatic = {
        "batch_tokens": _AUTO_BATCH_TOKENS,
        "shard_tokens": _AUTO_SHARD_TOKENS,
        "attn_implementation": attention,
        "threads_per_stage": 1,
    }
    for name, value in automatic.items():
        if options[name] == "auto":
            options[name] = recorded.options[name] if recorded and name in recorded.options else value
    return options


def _begin(inputs: _Inputs, progress: Progress) -> _Work:
    """Survey the prompts and claim the run."""
    found = survey(
        inputs.source, inputs.tokenizer, inputs.store, uuid4().hex[:12], inputs.options["shard_tokens"], on_progress=progress.surveying
    )
    waste = padding_waste(found.shards, inputs.options["batch_tokens"])
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
        fingerprints={**inputs.fingerprints, "prompts": inputs.source.fingerprint()},
        model=ModelFacts(config.model_type, inputs.table.num_layers, inputs.table.hidden_size),
        parts=tuple(
            PartSpec(inputs.options["sites"], layer, inputs.options["store_dtype"], inputs.table.hidden_size) for layer in inputs.layers
        ),
        num_shards=len(found.shards),
        counts=Counts(found.num_sequences, found.num_ready, found.num_quarantined, found.num_tokens),
        sequence_files=found.sequence_files,
    )
    try:
        return _Work(claim_run(inputs.store, job), found.shards, found.tokens)
    except RunConflictError:
        inputs.store.delete([file.key for file in found.sequence_files])
        raise


def _resume(inputs: _Inputs, recorded: JobRecord, progress: Progress) -> _Work:
    """Go on with a run: its shards as they were fixed, and the missing ones' prompts tokenised again."""
    require_same(inputs.store, recorded, inputs.options, {**inputs.fingerprints, "prompts": inputs.source.fingerprint()})
    shards = load_shards(inputs.store, recorded.sequence_files)
    run = claim_run(inputs.store, recorded)
    missing = run.missing(shards)
    progress.say(f"Going on with the run of {recorded.created_at}: {len(missing):,} of {len(shards):,} shards are missing.")
    tokens = respool(inputs.source, inputs.tokenizer, missing, inputs.store, recorded.sequence_files, on_progress=progress.surveying)
    return _Work(run, shards, tokens)


# -- with Ray -------------------------------------------------------------------------------------------------------------


def _extract_missing(inputs: _Inputs, work: _Work, missing: Sequence[Shard], progress: Progress) -> None:
    """Reserve room, start the chain, and commit each shard as it completes."""
    config, options = inputs.config, inputs.options
    itemsize_bytes = _ITEMSIZE_BYTES[options["compute_dtype"]]
    with cluster(config.placement_timeout_s) as room, stop_on_sigterm() as stop:
        spans = _spans(inputs, room, itemsize_bytes)
        num_replicas = _num_replicas(config, room, len(spans))
        with reserve(len(spans), room, config.placement_timeout_s, num_replicas) as reservations:
            limits = ChainLimits(
                parse_bytes(config.in_flight, "in_flight"), inputs.table.hidden_size, itemsize_bytes, config.stage_timeout_s
            )
            writer = WriterSpec(
                inputs.store.url,
                work.run.job.run_metadata(),
                _WRITER_QUEUE_BYTES,
                max(1, int(room.cpus / max(room.gpus, 1) / 2)) if room.gpus else 1,
                config.stage_timeout_s,
                config.compression,
            )
            for number, span in enumerate(spans):
                progress.say(f"stage {number}: {span}" + (f", in each of {num_replicas} replicas" if num_replicas > 1 else ""))
            specs = [_stage_spec(inputs, span) for span in spans]
            patience = Patience(config.stage_timeout_s, config.placement_timeout_s)
            all_stages = [Stages(specs, writer, reservation, patience, window(len(specs))) for reservation in reservations]
            batches_of = _micro_batches_of(work, options["batch_tokens"])
            chains = [(Chain(stages, limits, batches_of, progress.say), stages) for stages in all_stages]
            monitor = Monitor(chains, work.shards, missing, progress)
            with closing(Replicas(chains, missing, stop, progress.say).results(monitor.tick)) as results:
                for result in results:
                    work.run.commit(result.shard, result.attempt, result.receipts, result.micro_batches, result.elapsed_s)
                    monitor.committed()


def _micro_batches_of(work: _Work, batch_tokens: int) -> Callable[[Shard], Iterator[MicroBatch]]:
    """A shard's micro-batches. The spool is one file, and replicas read it from several threads: one shard at a time."""
    lock = threading.Lock()

    def batches(shard: Shard) -> Iterator[MicroBatch]:
        with lock:
            return iter(list(micro_batches(shard, work.tokens, batch_tokens)))

    return batches


def _num_replicas(config: ExtractConfig, room: ClusterSize, num_stages: int) -> int:
    """As asked, or as many as the GPUs hold."""
    return max(1, int(room.gpus) // num_stages) if config.replicas == "auto" else config.replicas


def _spans(inputs: _Inputs, room: ClusterSize, itemsize_bytes: int) -> list[LayerSpan]:
    """The layers up to the last one asked for, dealt out over the stages by their bytes."""
    num_layers = inputs.layers[-1] + 1
    num_stages = min(int(room.gpus) or 1, num_layers) if inputs.config.stages == "auto" else inputs.config.stages
    devices = partition(
        inputs.table.layer_bytes(itemsize_bytes)[:num_layers],
        first_bytes=inputs.table.role_bytes("embedding", itemsize_bytes),
        last_bytes=0,
        caps_bytes=[None] * num_stages,
    )
    return [device.span for device in devices]


def _stage_spec(inputs: _Inputs, span: LayerSpan) -> StageSpec:
    options = inputs.options
    return StageSpec(
        model_url=inputs.config.model,
        span=span,
        capture_layers=tuple(layer for layer in inputs.layers if layer in span),
        sites=(options["sites"],),
        compute_dtype=options["compute_dtype"],
        store_dtype=options["store_dtype"],
        attn_implementation=options["attn_implementation"],
        device="cpu",
        threads=options["threads_per_stage"],
    )
