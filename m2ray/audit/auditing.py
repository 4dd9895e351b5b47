"""The audit: a random sample of a run, computed again by transformers' whole model and by m2ray in other stages. Read `audit` first."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from m2ray.activations.audits import AuditRecord
from m2ray.activations.job import JobRecord, utc_now
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.audit.differences import Batch, By, Differences
from m2ray.audit.judging import Judge
from m2ray.audit.recorded import RecordedRows
from m2ray.audit.reference import Reference, read_config
from m2ray.audit.restaged import restage
from m2ray.audit.sample import Sample, draw, least_share_found
from m2ray.audit.shown import chosen, stored
from m2ray.audit.tokens import from_prompts, from_run, open_source, open_tokenizer
from m2ray.audit.tolerance import bound, has_router, require_reference, why_not_exact
from m2ray.batches import LayerSpan, MicroBatch, PartSpec, Shard
from m2ray.errors import M2rayError, NotInRunError, RunConflictError
from m2ray.hub import folder_of
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.stage import StageSpec
from m2ray.model.tensor_table import up_to_layer
from m2ray.model.vector_math import settle_vector_math
from m2ray.prompts import PromptSource, TokenSpool
from m2ray.prompts.shards import one_micro_batch
from m2ray.provenance import versions
from m2ray.sites import sites_of
from m2ray.storage import Store, local_folder

OnProgress = Callable[[str, int, int], object]
"""Takes what is being done, how much of it is done, and how much there is (0 where that is not known)."""


def audit(
    store: Store, share: float, seed: int, model: str | None = None, prompts: str | None = None, on_progress: OnProgress = lambda *_: None
) -> AuditRecord:
    """Draw a share of the committed sequences, compute their rows again in two other ways, and compare.

    Memory holds the model, where its devices and the host have room, else accelerate keeps layers in a temporary folder; beside it one
    micro-batch's layer, and 1 GiB of hidden states.

    Args:
        store: the run folder.
        share: of the committed sequences, above 0 and at most 1; at least one is drawn.
        seed: of the draw, and of the cut into stages.
        model, prompts: where they lie now; where the run says, by default.
        on_progress: called on the caller's thread.

    Raises:
        NotInRunError: nothing that can be audited is committed, or its products were made in FP8.
        RunConflictError: model or prompts are not those of the run.
        CheckpointError: the model cannot be loaded.
        RunDamagedError, StoreError: the run cannot be read.
    """
    began = utc_now()
    catalogue = Catalogue(store)
    if not catalogue.job.parts:
        what = f"The run at {store.url} keeps no rows that could be computed again."
        raise NotInRunError(what, "Leave --sample out: the files of its statistics are looked at without it.")
    require_reference(catalogue.job)
    job, sample = catalogue.job, draw(catalogue, share, seed)
    checkpoint = _checkpoint(job, model)
    config = read_config(checkpoint.url)
    inexact = why_not_exact(job, sample)
    work = _Work(catalogue, sample, RecordedRows(catalogue), Differences(by_row=not has_router(config)), checkpoint, seed, on_progress)
    with _threads(job.options.get("threads_per_stage") if not inexact else None):
        tokens, tokens_from, remarks = _token_ids(work, prompts, config.vocab_size, exact=not inexact)
        with tokens:
            _by_m2ray(work, tokens, config, exact=not inexact)
            why_not, not_found = _by_transformers(work, tokens, exact=not inexact)
            inexact += why_not
    differences = work.differences
    remarks += [f"not held to the same bits: {reason}" for reason in inexact]
    if job.format_version == 1:
        remarks.append("the model was not held against the run's fingerprint, which format 1 took otherwise")
    if differences.num_cleared:
        remarks.append(f"sequences beyond a bound by rounding alone, as transformers in float32 shows: {differences.num_cleared:,}")
    remarks += [f"held against m2ray in other stages alone: {', '.join(not_found)}"] if not_found else []
    return AuditRecord(
        format_version=FORMAT_VERSION,
        run_id=job.run_id,
        audited_at=began,
        share=share,
        seed=seed,
        sequences=len(sample.sequence_ids),
        of_sequences=sample.of_sequences,
        tokens=sum(piece.num_tokens for piece in sample.alone()),
        tokens_from=tokens_from,
        exact=not inexact,
        remarks=tuple(remarks),
        versions=versions(),
        compared=differences.compared(),
        num_wrong=differences.num_wrong,
        wrong=differences.wrong,
        cleared=differences.cleared,
        passed=differences.all_within,
        # Where tokens choose experts and bits may differ, one wrong sequence looks like one whose tokens chose others.
        least_share_found=None if inexact and has_router(config) else least_share_found(len(sample.sequence_ids), sample.of_sequences),
    )


@dataclass(frozen=True)
class _Work:
    """What is audited, against which model, and what was found so far. `unfit` are sequences whose tokens are wrong: they are not run."""

    catalogue: Catalogue
    sample: Sample
    recorded: RecordedRows
    differences: Differences
    checkpoint: Checkpoint
    seed: int
    on_progress: OnProgress
    unfit: set[int] = field(default_factory=set)

    def micro_batches(self, pieces: Sequence[Shard], tokens: TokenSpool) -> list[Callable[[], MicroBatch]]:
        """How to make each piece a micro-batch, right-padded. Pieces with a sequence whose tokens are wrong are left out."""
        return [partial(one_micro_batch, piece, tokens) for piece in pieces if not self.unfit.intersection(piece.sequence_ids.tolist())]

    def compare(self, by: By, batch: Batch, micro_batch: MicroBatch, part: PartSpec, rows_NB: torch.Tensor) -> None:
        """Hold the rows of a micro-batch's chosen tokens, uint8 [N, bytes of a row], against what the run holds of the sampled sequences.

        That these are the rows that it holds was seen before (`_other_tokens_in_rows`).
        """
        sequence_ids = micro_batch.sequence_ids[self.sample.places_in(micro_batch.sequence_ids)].tolist()
        ids_N = self.catalogue.job.selection.token_rows(micro_batch)["sequence_id"]
        is_sampled_N = np.isin(ids_N, sequence_ids)
        recorded_NB = self.recorded.rows(part, micro_batch.shard, sequence_ids)
        tolerance = 0.0 if batch == "recorded" else bound(self.catalogue.job, part)
        self.differences.add(by, batch, part, tolerance, recorded_NB, rows_NB[torch.from_numpy(is_sampled_N)], ids_N[is_sampled_N])


# -- computed again -------------------------------------------------------------------------------------------------------


def _by_m2ray(work: _Work, tokens: TokenSpool, config: Any, *, exact: bool) -> None:
    """In stages of another cut: the recorded micro-batches where they have to give the same bits, else each sequence alone."""
    job = work.catalogue.job
    batch: Batch = "recorded" if exact else "alone"
    micro_batches = work.micro_batches(work.sample.micro_batches if exact else work.sample.alone(), tokens)
    spec = StageSpec(
        model_url=work.checkpoint.url,
        span=LayerSpan(0, job.layers_run),
        compute_dtype=job.options["compute_dtype"],
        attn_implementation=job.options["attn_implementation"],
        device="cpu" if exact or not torch.cuda.is_available() else "cuda:0",
        threads=None,
        with_final_norm=job.with_final_norm,
        model_files=work.checkpoint.digests,
    )
    capture = CaptureSpec(sites_of(job.parts), job.options["store_dtype"], job.selection)
    done, all_parts = 0, len(micro_batches) * len(job.parts)

    def on_rows(micro_batch: MicroBatch, part: PartSpec, rows_NB: torch.Tensor) -> None:
        nonlocal done
        work.compare("m2ray", batch, micro_batch, part, rows_NB)
        done += 1
        work.on_progress("sites and layers of micro-batches by m2ray", done, all_parts)

    loaded = restage(spec, capture, micro_batches, config, work.seed, on_rows)
    if loaded and job.format_version > 1:
        hold_weights(work.catalogue.store, job, loaded)


def _by_transformers(work: _Work, tokens: TokenSpool, *, exact: bool) -> tuple[list[str], list[str]]:
    """By its whole model: the recorded micro-batches where they have to give the same bits, and each sequence alone.

    Returns:
        Why they do not have to after all; and the sites of which nothing was found there.
    """
    job, sample, options = work.catalogue.job, work.sample, work.catalogue.job.options
    parts, seen = {(part.site, part.layer): part for part in job.parts}, set()
    with Reference(work.checkpoint.url, options["compute_dtype"], options["attn_implementation"], on_cpu=exact) as reference:
        kinds: list[tuple[Batch, Sequence[Shard]]] = [("alone", sample.alone())]
        if exact and reference.in_memory:
            kinds.insert(0, ("recorded", sample.micro_batches))
        for batch, pieces in kinds:
            micro_batches = work.micro_batches(pieces, tokens)
            for number, get in enumerate(micro_batches, 1):
                micro_batch = get()

                def on_site(site: str, layer: int | None, *values_BTW: torch.Tensor) -> None:
                    rows_NW = [chosen(each.to("cpu"), job.selection, micro_batch) for each in values_BTW]  # noqa: B023 - called within this round
                    seen.add((site, layer))
                    work.compare("transformers", batch, micro_batch, parts[site, layer], stored(parts[site, layer], rows_NW))  # noqa: B023

                reference.run(torch.from_numpy(micro_batch.token_ids_BT).long(), parts.keys(), on_site)
                work.on_progress(f"micro-batches by transformers, {batch}", number, len(micro_batches))
        _judge(work, tokens, reference, has_bits=exact and reference.in_memory)
        inexact = ["transformers' model does not fit into memory as a whole"] if exact and not reference.in_memory else []
    return inexact, sorted({site for site, _ in parts.keys() - seen}) if seen else []


def _judge(work: _Work, tokens: TokenSpool, reference: Reference, *, has_bits: bool) -> None:
    """Settle what is in doubt; with `has_bits` rows that are not wrong have transformers' bits in the recorded micro-batches."""
    alone = {int(piece.sequence_ids[0]): piece for piece in work.sample.alone()}
    recorded = {number: piece for piece in work.sample.micro_batches for number in piece.sequence_ids.tolist()}

    def beside_others(number: int) -> MicroBatch | None:
        found = work.micro_batches([recorded[number]], tokens) if has_bits else []
        return found[0]() if found else None

    judge = Judge(work.catalogue.job, work.recorded, reference, work.seed)
    on_done = partial(work.on_progress, "sequences in doubt by transformers in float32")
    judge.settle(work.differences, lambda number: one_micro_batch(alone[number], tokens), beside_others, on_done)


# -- what the rows are of -------------------------------------------------------------------------------------------------


def _checkpoint(job: JobRecord, model: str | None) -> Checkpoint:
    """The run's checkpoint, with the files that it needs. Raises NotInRunError if nobody knows where, RunConflictError if it is another one.

    Of a run of format 1 the fingerprint was another: what lies there is taken for its model.
    """
    named = model or job.names.get("model")
    folder = local_folder(folder_of(named)) if named else None
    if folder is None:
        raise NotInRunError(
            f"The run's model {named or 'has no name in job.json'}: transformers reads local folders.", "Give --model FOLDER."
        )
    checkpoint, _ = up_to_layer(open_checkpoint(str(folder)), job.layers_run - 1, with_final_norm=job.with_final_norm)
    if job.format_version > 1 and checkpoint.digest != job.fingerprints["model"]:
        raise RunConflictError(f"The checkpoint at {folder} is not that of the run.", "Give the run's by --model.")
    return checkpoint


def _token_ids(
    work: _Work, prompts: str | None, vocab_size: int, *, exact: bool
) -> tuple[TokenSpool, Literal["prompts", "run"], list[str]]:
    """The token ids of all sequences that are run again; those whose tokens are wrong have failed, and are not among them.

    From the prompts, and from the run where nobody says where these are and they are not where they were.
    """
    pieces, told = work.sample.micro_batches if exact else work.sample.alone(), dict[int, str]()
    source, remarks = _source(work.catalogue.job, prompts)
    if source is None:
        tokens, wrong = from_run(work.catalogue, work.recorded, pieces)
    else:
        tokenizer = open_tokenizer(work.catalogue.job, work.checkpoint.url, vocab_size)
        wanted = np.unique(np.concatenate([piece.sequence_ids for piece in pieces]))
        on_row = partial(work.on_progress, "rows of the prompts")
        tokens, wrong, told = from_prompts(work.catalogue, source, tokenizer, wanted, lambda done: on_row(done, 0))
    wrong |= _other_tokens_in_rows(work, tokens, wrong)
    for sequence_id, why in [*wrong.items(), *told.items()]:
        work.differences.fail(sequence_id, why)
    work.unfit.update(wrong)
    if left_out := len(pieces) - len(work.micro_batches(pieces, tokens)):
        remarks.append(f"{left_out:,} of {len(pieces):,} micro-batches were not run again: tokens in them are wrong")
    return tokens, "run" if source is None else "prompts", remarks


def _source(job: JobRecord, prompts: str | None) -> tuple[PromptSource | None, list[str]]:
    """The run's prompts; or None, and why tokens have to be those of the run. Raises as `open_source` where the caller says where they are."""
    named = prompts or job.names.get("prompts")
    why = "job.json does not say where the prompts were"
    if job.format_version == 1:
        why = "runs of format 1 do not say how their prompts became tokens"
    elif named:
        try:
            return open_source(job, folder_of(named, "dataset")), []
        except M2rayError as error:
            if prompts:
                raise
            why = error.what
    return None, [f"tokens are the run's own, so that another tokenizer would not show: {why}"]


def _other_tokens_in_rows(work: _Work, tokens: TokenSpool, wrong: Container[int]) -> dict[int, str]:
    """Of the other sampled sequences those of which the run has rows of other tokens than their prompts give, or not of all."""
    found = {}
    for piece in work.sample.alone():
        number = int(piece.sequence_ids[0])
        if number not in wrong:
            wanted = work.catalogue.job.selection.token_rows(one_micro_batch(piece, tokens))
            if not np.array_equal(work.recorded.tokens(piece.index, number), wanted):
                found[number] = "the run has rows of other tokens than its prompt gives"
    return found


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """As many threads for torch as the run had; as many as there are with None."""
    settle_vector_math()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
