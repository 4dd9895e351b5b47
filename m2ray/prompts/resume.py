"""A resume's view of the prompts: the shards as the survey fixed them, and the missing ones' tokens once more."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2ray.batches import SequenceFile, Shard
from m2ray.errors import RunConflictError, RunDamagedError
from m2ray.prompts.retokenizing import marked_again
from m2ray.prompts.shards import ShardCounts, ShardTable
from m2ray.prompts.sources import PromptSource
from m2ray.prompts.spool import TokenSpool
from m2ray.prompts.surveying import prompt_digest
from m2ray.prompts.tokenize import PromptTokenizer
from m2ray.sequences import read_sequences
from m2ray.storage import Store


def load_shards(store: Store, sequence_files: Iterable[SequenceFile]) -> ShardTable:
    """The shards that an earlier survey fixed.

    Raises:
        RunDamagedError: a file is absent, or differs from what the run recorded.
        StoreError: a file cannot be read.
    """
    shards: list[ShardCounts] = []
    for file in sequence_files:
        table = read_sequences(store, file, ["sequence_id", "token_count", "row_count", "shard"])
        table = table.filter(pc.is_valid(table["shard"]))
        numbers = table["shard"].to_numpy()
        order = np.argsort(numbers, kind="stable")  # within a shard the ids stay ascending
        present, starts = np.unique(numbers[order], return_index=True)
        if not np.array_equal(present, np.arange(len(shards), len(shards) + len(present))):
            raise RunDamagedError(
                f"The shards in {file.key} do not follow those before it.", "List the run's files in the order they were written."
            )
        if len(present):
            sorted_columns = (table[name].to_numpy()[order] for name in ("sequence_id", "token_count", "row_count"))
            shards += zip(*(np.split(column, starts[1:]) for column in sorted_columns), strict=True)
    return ShardTable.join(shards)


def respool(
    source: PromptSource,
    tokenizer: PromptTokenizer,
    missing: Sequence[Shard],
    store: Store,
    sequence_files: Iterable[SequenceFile],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> TokenSpool:
    """Tokenise the rows of the missing shards again (where prompts are packed, all rows before too). The caller closes the spool.

    Args:
        source: the run's prompts.
        tokenizer: the model's.
        missing: the shards whose tokens are needed.
        store: the run folder.
        sequence_files: all that the survey wrote, in order.
        on_progress: called with the number of source rows passed so far.

    Raises:
        RunConflictError: a row no longer gives the tokens that it gave to the survey.
        RunDamagedError: a file of `sequences/` differs from what the run recorded.
    """
    recorded = _recorded(missing, store, sequence_files)
    wanted_ids = recorded["sequence_id"].to_numpy()
    tokens = TokenSpool(keeps_masks=tokenizer.selection.needs_mask)
    try:
        for num_passed, again in marked_again(source, tokenizer, wanted_ids):
            facts = recorded.slice(len(tokens), len(again)).select(["prompt_digest", "row_count"]).to_pylist()
            for (row, marked), recorded_row in zip(again, facts, strict=True):
                if isinstance(marked, str):
                    raise _changed(f"sequence {row.sequence_id} (row {row.row_id}) is bad now: {marked}")
                found = {
                    "prompt_digest": prompt_digest(marked.token_ids),
                    "row_count": tokenizer.selection.row_count(marked.token_ids, marked.loss_mask),
                }
                if found != recorded_row:
                    raise _changed(f"sequence {row.sequence_id} (row {row.row_id}) gives other tokens than when the run began")
                tokens.append(row.sequence_id, marked.token_ids, marked.loss_mask)
            if on_progress is not None:
                on_progress(num_passed)
        if len(tokens) < len(wanted_ids):
            raise _changed(f"sequence {wanted_ids[len(tokens)]} and later ones are no longer in {source.options.prompts}")
    except BaseException:
        tokens.close()
        raise
    finally:
        tokenizer.close()
    return tokens


def _recorded(missing: Sequence[Shard], store: Store, sequence_files: Iterable[SequenceFile]) -> Any:
    """The missing shards' sequence ids, ascending, prompt digests and row counts: a pyarrow table of about 60 bytes a sequence."""
    numbers = pa.array([shard.index for shard in missing], pa.int32())
    tables = []
    for file in sequence_files:
        table = read_sequences(store, file, ["sequence_id", "shard", "prompt_digest", "row_count"])
        tables.append(table.filter(pc.is_in(table["shard"], value_set=numbers)))
    return pa.concat_tables(tables).combine_chunks()


def _changed(what: str) -> RunConflictError:
    return RunConflictError(
        f"The prompts have changed: {what}.", "Restore the prompts and the tokenizer, or start a new run in another folder."
    )
