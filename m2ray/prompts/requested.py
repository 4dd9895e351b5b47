"""The prompts of one small request: in memory, checked and cut as a run of them cuts them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.batches import Int32Array, MicroBatch, Shard
from m2ray.errors import PromptsError, raise_all
from m2ray.prompts.masks import Marked
from m2ray.prompts.rows import Columns, Kind, Record, as_row
from m2ray.prompts.shards import cut_shards, micro_batches
from m2ray.prompts.tokenize import PromptTokenizer
from m2ray.selection import Selection


class RequestedPrompts:
    """Prompts with their token ids, numbered from 0 on.

    Args:
        prompts: texts, chats (lists of messages) or lists of token ids.
        kind: which of these they are.
        selection: which tokens are chosen.

    Raises:
        PromptsError: a prompt would be quarantined in a run, or brings no loss mask where the choice goes by it; all of them at once.
    """

    def __init__(self, tokenizer: PromptTokenizer, prompts: Sequence[Any], kind: Kind, selection: Selection) -> None:
        columns = Columns(kind, kind)
        tokenizer.require(columns)
        rows = [as_row(Record({kind: prompt}), number, columns) for number, prompt in enumerate(prompts)]
        marked = tokenizer.marked(rows)
        reasons = [_why_not(found, selection) for found in marked]
        raise_all([PromptsError(f"Prompt {number}: {reason}.") for number, reason in enumerate(reasons) if reason])
        self._marked = [found for found in marked if isinstance(found, Marked)]
        self._selection = selection

    @cached_property
    def token_counts(self) -> Int32Array:
        """Of each prompt, int32 [S]."""
        return np.array([len(found.token_ids) for found in self._marked], np.int32)

    @cached_property
    def num_rows(self) -> int:
        """Chosen tokens of all prompts together; one a prompt for a mean."""
        return sum(self._selection.row_count(found.token_ids, found.loss_mask) for found in self._marked)

    # -- as a TokenSpool has it -----------------------------------------------------------------------------------------

    @property
    def keeps_masks(self) -> bool:
        """Whether micro-batches have loss masks."""
        return self._selection.needs_mask

    def read(self, sequence_id: int) -> Int32Array:
        """A prompt's token ids."""
        return self._marked[sequence_id].token_ids

    def mask(self, sequence_id: int) -> npt.NDArray[np.bool_]:
        """A prompt's loss mask."""
        return np.frombuffer(self._marked[sequence_id].loss_mask or b"", np.bool_)

    def micro_batches(self, shard_tokens: int, batch_tokens: int) -> Iterator[MicroBatch]:
        """The prompts in the shards and micro-batches of a run of theirs."""
        counts = self.token_counts
        for number, places in enumerate(cut_shards(counts, shard_tokens)):
            yield from micro_batches(Shard(number, places.astype(np.int64), counts[places]), self, batch_tokens)


def _why_not(found: Marked | str, selection: Selection) -> str | None:
    if isinstance(found, str):
        return found
    return "no loss mask" if selection.needs_mask and found.loss_mask is None else None
