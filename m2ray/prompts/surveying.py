"""The survey: one pass over the source that tokenises once, quarantines bad rows and fixes the shards."""

import gc
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass

import xxhash

from m2ray.batches import Int32Array, SequenceFile
from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts.fingerprint import Fingerprint
from m2ray.prompts.kept import KeptColumns
from m2ray.prompts.masks import Marked
from m2ray.prompts.packing import Packer
from m2ray.prompts.rows import MAX_PROMPT_BYTES, PromptRow
from m2ray.prompts.shards import WINDOW_ROWS, ShardCounts, ShardTable
from m2ray.prompts.sources import PromptSource
from m2ray.prompts.spool import TokenSpool
from m2ray.prompts.tokenize import PromptTokenizer
from m2ray.prompts.window import Window
from m2ray.selection import Selection
from m2ray.sequences import SequencesWriter
from m2ray.storage import Store

_BATCH_ROWS = 8192
_SHOWN_REASONS = 5
_KINDS_OF_REASONS = 1000
_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Survey:
    """What the survey found. `num_sequences` = `num_ready` + `num_quarantined`; `first_quarantined` are lines on the first few;
    `num_empty_masks` ready rows have a loss mask that is 0 at every token, `num_without_rows` of all ready ones no chosen token.

    Where prompts are packed, a sequence is a context, or a prompt or a remainder that is quarantined.

    `fingerprint` is of the bytes that were read; PromptSource.fingerprint gives the same for the same files. `tokens` is open: close it
    once the extraction is done.
    """

    shards: ShardTable
    num_sequences: int
    num_ready: int
    num_quarantined: int
    num_tokens: int
    num_empty_masks: int
    num_without_rows: int
    first_quarantined: tuple[str, ...]
    sequence_files: tuple[SequenceFile, ...]
    fingerprint: str
    tokens: TokenSpool

    @property
    def first_prompt(self) -> Int32Array:
        """The token ids of the first ready sequence, int32 [T]."""
        return self.tokens.read(self.tokens.first_id)


def survey(
    source: PromptSource,
    tokenizer: PromptTokenizer,
    store: Store,
    attempt: str,
    shard_tokens: int,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read and tokenise every row once; write `sequences/`; fix the shards.

    The same rows, tokenizer and `shard_tokens` give the same shards. Memory holds one window of row ids, one batch of
    prompts and about 40 bytes a sequence. If it fails, the files that it wrote are deleted.

    Args:
        source: the rows.
        tokenizer: the model's.
        store: the run folder.
        attempt: unique to this try; part of the files' names.
        shard_tokens: tokens in a shard, at most.
        on_progress: called with the number of rows done so far.

    Raises:
        PromptsError: a file is damaged or changes meanwhile, no row is left after quarantine, or more than `quarantine_limit` of them are
            quarantined; or no token of any is chosen.
        StoreError: the store or the temporary folder refuses.
    """
    tokens, fingerprint = TokenSpool(keeps_masks=tokenizer.selection.needs_mask), Fingerprint()
    try:
        tokenizer.require(source.columns)
        batches, packer = _marked(source, tokenizer, row_batches(source.rows(fingerprint))), tokenizer.packer()
        with (
            _old_objects_passed_over(),
            SequencesWriter(store, attempt, source.columns.kept.schema) as writer,
            closing(_SurveyPass(writer, tokens, shard_tokens, tokenizer.selection, source.columns.kept)) as survey_pass,
            closing(batches),
        ):
            for rows, marked in batches if packer is None else packer.packed(batches):
                survey_pass.add(rows, marked)
                if on_progress is not None:
                    on_progress(survey_pass.num_rows)
            return survey_pass.finish(source, fingerprint, packer)
    except BaseException:
        tokens.close()
        raise
    finally:
        tokenizer.close()


@contextmanager
def _old_objects_passed_over() -> Iterator[None]:
    """Python's collector looks at new objects alone: a quarter of the survey's time it would go through torch's and transformers' again."""
    if gc.get_freeze_count():  # as it is already, to the end of the program
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _marked(
    source: PromptSource, tokenizer: PromptTokenizer, batches: Iterable[list[PromptRow]]
) -> Generator[tuple[list[PromptRow], list[Marked | str]]]:
    """Each batch with its tokens. While one is tokenised, on all cores and without Python, the caller takes the one before.

    The next one is read meanwhile, too, where that may be. Chats are rendered by a process that this thread is to be able to leave at once.
    """
    if source.columns.is_messages:
        for rows in batches:
            yield rows, tokenizer.marked(rows)
        return
    before: tuple[list[PromptRow], Future[list[Marked | str]]] | None = None
    with ThreadPoolExecutor(1, "tokenize") as thread:
        for rows in batches:
            tokenized = thread.submit(tokenizer.marked, rows)
            if before is not None:
                yield before[0], before[1].result()
            before = rows, tokenized
            if not source.may_be_read_ahead:
                wait([tokenized])
        if before is not None:
            yield before[0], before[1].result()


def prompt_digest(token_ids: Int32Array) -> str:
    """xxh3-128 of the token ids' little-endian int32 bytes, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(token_ids.astype("<i4", copy=False).tobytes())


def row_batches(rows: Iterable[PromptRow]) -> Iterator[list[PromptRow]]:
    """Consecutive rows for the tokenizer, bounded in number and in bytes, cut at the windows' ends."""
    batch: list[PromptRow] = []
    num_bytes = 0
    for row in rows:
        if batch and num_bytes + row.num_bytes > MAX_PROMPT_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(row)
        num_bytes += row.num_bytes
        if len(batch) == _BATCH_ROWS or (row.sequence_id + 1) % WINDOW_ROWS == 0:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _SurveyPass:
    """The survey on its way through the rows."""

    def __init__(self, writer: SequencesWriter, tokens: TokenSpool, shard_tokens: int, selection: Selection, kept: KeptColumns) -> None:
        self.num_rows = 0
        self._writer = writer
        self._tokens = tokens
        self._shard_tokens = shard_tokens
        self._selection = selection
        self._shards: list[ShardCounts] = []
        self._sample: list[str] = []
        self._reasons: Counter[str] = Counter()
        self._kept = kept
        self._window = Window(first_id=0, kept=kept.schema)
        self._num_masks = 0
        self._num_empty_masks = 0
        self._num_without_rows = 0

    def add(self, rows: Sequence[PromptRow], marked_rows: Sequence[Marked | str]) -> None:
        """Take a batch, which does not cross a window's end."""
        for row, marked in zip(rows, marked_rows, strict=True):
            if isinstance(marked, str):
                reason = marked[:_REASON_CHARACTERS]  # a template's own words may have any length
                self._window.quarantine(row.row_id, reason)
                self._count(reason)
                if len(self._sample) < _SHOWN_REASONS:
                    self._sample.append(f"row {row.row_id} (place {row.sequence_id}): {reason}")
            else:
                row_count = self._selection.row_count(marked.token_ids, marked.loss_mask)
                self._num_without_rows += not row_count
                self._window.add(row.row_id, prompt_digest(marked.token_ids), len(marked.token_ids), row_count)
                self._tokens.append(row.sequence_id, marked.token_ids, marked.loss_mask)
                if marked.loss_mask is not None:
                    self._num_masks += 1
                    self._num_empty_masks += 1 not in marked.loss_mask
        self._window.mark(marked_rows, [row.kept for row in rows])
        self.num_rows += len(rows)
        if self.num_rows % WINDOW_ROWS == 0:
            self._close_window()

    def finish(self, source: PromptSource, fingerprint: Fingerprint, packer: Packer | None) -> Survey:
        if len(self._window):
            self._close_window()
        num_quarantined = self.num_rows - len(self._tokens)
        num_refused, num_given = (packer.num_refused, packer.num_documents) if packer else (num_quarantined, self.num_rows)
        if not self._shards or num_refused > source.options.quarantine_limit * num_given:
            raise self._too_few(source.options, num_refused, num_given)
        if self._num_masks and self._num_masks == self._num_empty_masks:
            raise PromptsError(
                f"The loss masks of all {self._num_masks:,} rows of {source.options.prompts} that have one are 0 at every token.",
                "Nothing could be trained on them: correct the masks, or leave them out.",
            )
        if self._num_without_rows == len(self._tokens):
            raise PromptsError(
                f"tokens = {self._selection.tokens!r} chooses no token of any of the {len(self._tokens):,} rows of {source.options.prompts}"
                f"{' but special ones, which are skipped' if self._selection.skip_ids else ''}.",
                "Choose others.",
            )
        return Survey(
            shards=ShardTable.join(self._shards),
            num_sequences=self.num_rows,
            num_ready=len(self._tokens),
            num_quarantined=num_quarantined,
            num_tokens=self._tokens.num_tokens,
            num_empty_masks=self._num_empty_masks,
            num_without_rows=self._num_without_rows,
            first_quarantined=tuple(self._sample),
            sequence_files=self._writer.finish(),
            fingerprint=fingerprint.hexdigest(),
            tokens=self._tokens,
        )

    def close(self) -> None:
        """Delete what lies in the temporary folder."""
        self._window.close()

    def _close_window(self) -> None:
        self._shards += self._window.finish(self._writer, len(self._shards), self._shard_tokens)
        self._window.close()
        self._window = Window(first_id=self.num_rows, kept=self._kept.schema)

    def _count(self, reason: str) -> None:
        """Reasons that differ in a number or a quoted word are of one kind."""
        kind = re.sub(r"\d+|'[^']*'", "...", reason)
        self._reasons[kind if kind in self._reasons or len(self._reasons) < _KINDS_OF_REASONS else "others"] += 1

    def _too_few(self, options: PromptOptions, num_quarantined: int, num_given: int) -> PromptsError:
        if not num_given:
            return PromptsError(f"The prompts {options.prompts} hold no rows.", "Give at least one prompt.")
        counted = [f"{count:,} rows: {kind}" for kind, count in self._reasons.most_common(_SHOWN_REASONS)]
        told = [*counted, "The first of these rows:", *self._sample]
        if not len(self._tokens):
            return PromptsError(f"None of the {num_given:,} rows of {options.prompts} can be used. The reasons:", "", told)
        return PromptsError(
            f"{num_quarantined:,} of the {num_given:,} rows of {options.prompts} cannot be used, "
            f"more than quarantine_limit = {options.quarantine_limit} allows. The reasons:",
            "Correct the prompts or the options that they are read by, or raise quarantine_limit.",
            told,
        )
