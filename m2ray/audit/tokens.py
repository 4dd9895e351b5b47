"""The audited sequences' token ids: the prompts tokenised once more, or what the run holds where it has them all."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from datetime import date
from typing import Any

import numpy as np

from m2ray.activations.job import JobRecord
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.audit.recorded import RecordedRows
from m2ray.batches import Int64Array, Shard
from m2ray.errors import NotInRunError, RunConflictError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, PromptTokenizer, TokenSpool
from m2ray.prompts.masks import Marked
from m2ray.prompts.retokenizing import marked_again
from m2ray.prompts.rows import PromptRow
from m2ray.prompts.surveying import prompt_digest

OTHER_TOKENS = "its prompt gives other tokens than the run says"


def recorded_options(options: Mapping[str, Any], prompts: str) -> PromptOptions:
    """What decided the run's sequences, as job.json says, for prompts that lie at `prompts`."""
    known = {each.name: options[each.name] for each in fields(PromptOptions) if each.name in options}
    if known.get("special_tokens") == "add_where_absent":
        known["special_tokens"] = "auto"  # which came to that
    known["skip_ids"] = tuple(known.get("skip_ids", ()))
    if known.get("template_date"):
        known["template_date"] = date.fromisoformat(known["template_date"])
    return PromptOptions(**{**known, "prompts": prompts})


def open_tokenizer(job: JobRecord, model: str, vocab_size: int) -> PromptTokenizer:
    """The tokenizer of `model`, by the options of the run.

    Raises:
        CheckpointError, StoreError: it cannot be read.
        RunConflictError: it, or its chat template, is not that of the run.
    """
    options = replace(recorded_options(job.options, ""), chat_template=job.names.get("chat_template"))
    tokenizer = PromptTokenizer.load(model, options, vocab_size)
    here = {"tokenizer": tokenizer.tokenizer_digest, "template": tokenizer.template_digest}
    differing = [name for name, found in here.items() if job.fingerprints.get(name, found) != found]
    if differing:
        raise RunConflictError(f"{model} has not the {' and the '.join(differing)} of the run.", "Give the run's model (--model, model=).")
    return tokenizer


def open_source(job: JobRecord, prompts: str) -> PromptSource:
    """The run's prompts, which lie at `prompts`.

    Raises:
        PromptsError, StoreError: they cannot be read.
        RunConflictError: they are not those of the run.
    """
    source = PromptSource.open(recorded_options(job.options, prompts))
    if source.fingerprint() != job.fingerprints.get("prompts"):
        raise RunConflictError(f"The prompts at {prompts} are not those of the run.", "Give the run's by --prompts.")
    return source


def from_prompts(
    catalogue: Catalogue, source: PromptSource, tokenizer: PromptTokenizer, wanted: Int64Array, on_row: Callable[[int], object]
) -> tuple[TokenSpool, dict[int, str], dict[int, str]]:
    """Tokenise these sequences again.

    Args:
        catalogue: the run.
        source, tokenizer: the run's.
        wanted: sequence ids, ascending.
        on_row: called with the number of rows passed.

    Returns:
        The token ids, which the caller closes; by sequence what is wrong with them: those are left out of the spool; and what else `sequences/`
        says otherwise of sequences: row id, loss mask, roles, documents, kept columns.
    """
    tokens, wrong, num_found = TokenSpool(keeps_masks=tokenizer.selection.needs_mask), {}, 0
    told: dict[int, str] = {}
    try:
        for num_passed, again in marked_again(source, tokenizer, wanted):
            for row, marked in again:
                if isinstance(marked, str):
                    wrong[row.sequence_id] = f"its prompt is bad: {marked}"
                    continue
                recorded = catalogue.sequence(row.sequence_id)
                if prompt_digest(marked.token_ids) != recorded["prompt_digest"]:
                    wrong[row.sequence_id] = OTHER_TOKENS
                    continue
                tokens.append(row.sequence_id, marked.token_ids, marked.loss_mask)
                facts = _facts(row, marked) | source.columns.kept.as_read(row.kept)
                # As Python writes them: what is no number is none here as there.
                if differing := [name for name, value in facts.items() if name in recorded and repr(recorded[name]) != repr(value)]:
                    told[row.sequence_id] = f"its prompt has another {' and another '.join(differing)} than `sequences/` says"
            num_found += len(again)
            on_row(num_passed)
        wrong |= dict.fromkeys(wanted[num_found:].tolist(), f"it is beyond the rows of {source.options.prompts}")
    except BaseException:
        tokens.close()
        raise
    return tokens, wrong, told


def _facts(row: PromptRow, marked: Marked) -> dict[str, Any]:
    """What `sequences/` has to say of a sequence besides its tokens, by its columns."""
    return {
        "row_id": row.row_id,
        "loss_mask": None if marked.loss_mask is None else list(marked.loss_mask),
        "roles": None if marked.roles is None else [{"role": role, "start": start, "stop": stop} for role, start, stop in marked.roles],
        "documents": None if marked.documents is None else [document._asdict() for document in marked.documents],
    }


def from_run(catalogue: Catalogue, recorded: RecordedRows, pieces: tuple[Shard, ...]) -> tuple[TokenSpool, dict[int, str]]:
    """The token ids of these pieces' sequences as the run's own rows have them, held against `prompt_digest`.

    Raises NotInRunError where the run does not have a row of every token.
    """
    shard_of = {number: piece.index for piece in pieces for number in piece.sequence_ids.tolist()}
    tokens, wrong = TokenSpool(), {}
    try:
        for piece in pieces:
            if not (catalogue.job.selection.is_all and recorded.holds_all(piece)):
                raise NotInRunError("The run does not hold all tokens of its prompts.", "Give the prompts by --prompts.")
        for number in sorted(shard_of):
            found = np.ascontiguousarray(recorded.tokens(shard_of[number], number)["token_id"])
            if prompt_digest(found) == catalogue.sequence(number)["prompt_digest"]:
                tokens.append(number, found)
            else:
                wrong[number] = OTHER_TOKENS
    except BaseException:
        tokens.close()
        raise
    return tokens, wrong
