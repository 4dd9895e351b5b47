"""Some sequences' tokens once more, as the survey found them: what a resume and an audit begin with."""

from collections.abc import Iterator

import numpy as np

from m2ray.batches import Int64Array
from m2ray.prompts.masks import Marked
from m2ray.prompts.rows import PromptRow
from m2ray.prompts.sources import PromptSource
from m2ray.prompts.surveying import row_batches
from m2ray.prompts.tokenize import PromptTokenizer

Again = list[tuple[PromptRow, Marked | str]]


def marked_again(source: PromptSource, tokenizer: PromptTokenizer, wanted_ids: Int64Array) -> Iterator[tuple[int, Again]]:
    """The sequences of `wanted_ids` (ascending), some at a time: how many were passed by then, and of each its row and its tokens.

    Only their rows are tokenised, but where prompts are packed: there every document before the last of them is. It ends with the last of
    them, or, if there are fewer, with the source.

    Raises:
        PromptsError: a file cannot be read.
    """
    if not len(wanted_ids):
        return
    packer, batches = tokenizer.packer(), row_batches(source.rows())
    if packer is not None:
        for rows, marked in packer.packed((rows, tokenizer.marked(rows)) for rows in batches):
            places = [number - rows[0].sequence_id for number in _within(wanted_ids, rows)]
            yield rows[-1].sequence_id + 1, [(rows[place], marked[place]) for place in places]
            if rows[-1].sequence_id >= wanted_ids[-1]:
                return
        return
    for rows in batches:
        if rows[0].sequence_id > wanted_ids[-1]:
            return
        chosen = [rows[number - rows[0].sequence_id] for number in _within(wanted_ids, rows)]
        yield rows[-1].sequence_id + 1, list(zip(chosen, tokenizer.marked(chosen), strict=True))


def _within(wanted_ids: Int64Array, rows: list[PromptRow]) -> list[int]:
    start, stop = np.searchsorted(wanted_ids, [rows[0].sequence_id, rows[-1].sequence_id + 1])
    found: list[int] = wanted_ids[start:stop].tolist()
    return found
