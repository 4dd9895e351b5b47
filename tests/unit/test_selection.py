"""Which tokens become rows: every choice against its words, told twice: by a micro-batch and by a sequence alone."""

from collections.abc import Sequence

import numpy as np
import pytest

from m2ray.batches import MicroBatch
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError
from m2ray.option_text import parse_tokens
from m2ray.selection import Selection

LENGTHS = (7, 1, 12, 3, 5)
SPECIAL = (0, 3)
EVERY_CHOICE = ("all", "last", "last:1", "last:4", "last:99", "first:1", "first:3", "every:1", "every:3", "every:50")
BY_MASK = ("mask", "mask:last:2", "mean:mask")


def micro_batch() -> MicroBatch:
    rng = np.random.default_rng(4)
    token_ids_BT, mask_BT = rng.integers(0, 6, (len(LENGTHS), 12)).astype(np.int32), rng.random((len(LENGTHS), 12)) < 0.5
    mask_BT[3] = False
    return MicroBatch(0, 0, True, np.array([4, 5, 9, 11, 30]), np.array(LENGTHS, np.int32), token_ids_BT, mask_BT)


def places(tokens: str, token_ids: Sequence[int], mask: Sequence[bool], skipped: Sequence[int]) -> list[int]:
    """The places of one sequence, as the documentation puts it."""
    words = tokens.split(":")
    by_mask = "mask" in words
    found = [place for place, token_id in enumerate(token_ids) if token_id not in skipped and (mask[place] or not by_mask)]
    if "last" in words:
        return found[-int(words[-1]) if words[-1] != "last" else -1 :]
    if "first" in words:
        return found[: int(words[-1])]
    return [place for place in found if "every" not in words or place % int(words[-1]) == 0]


@pytest.mark.parametrize("skipped", [(), SPECIAL], ids=["all ids", "without special ids"])
@pytest.mark.parametrize("tokens", [*EVERY_CHOICE, *BY_MASK, "mean"])
def test_a_choice_is_what_its_words_say(tokens: str, skipped: tuple[int, ...]) -> None:
    chosen, batch = Selection(tokens, skipped), micro_batch()
    rows, counts = [], []
    for row, (sequence_id, length) in enumerate(zip(batch.sequence_ids.tolist(), LENGTHS, strict=True)):
        token_ids, mask = batch.token_ids_BT[row, :length], batch.mask_BT[row, :length]
        found = places(tokens, token_ids.tolist(), mask.tolist(), skipped)
        of_sequence = [(sequence_id, place, int(token_ids[place])) for place in found]
        of_sequence = [(sequence_id, -1, -1)] * bool(found) if "mean" in tokens else of_sequence
        assert chosen.row_count(token_ids, mask.tobytes()) == len(of_sequence)
        rows += of_sequence
        counts += [len(found)] if found else []
    assert chosen.token_rows(batch).tolist() == rows
    assert chosen.chosen_counts(batch).tolist() == counts
    assert len(chosen.places(batch)) == sum(counts)
    if "mean" not in tokens:
        assert batch.token_ids_BT.reshape(-1)[chosen.places(batch)].tolist() == [token_id for _, _, token_id in rows]


def test_a_choice_without_masks_needs_none() -> None:
    batch = micro_batch()
    assert [tokens for tokens in (*EVERY_CHOICE, "mean", *BY_MASK) if Selection(tokens).needs_mask] == list(BY_MASK)
    bare = MicroBatch(0, 0, True, batch.sequence_ids, batch.token_counts, batch.token_ids_BT)
    assert Selection("last:2").token_rows(bare).tolist() == Selection("last:2").token_rows(batch).tolist()


@pytest.mark.parametrize(
    "tokens", ["", "first", "last:0", "last:-1", "every:", "every:x", "mask:first:2", "mask:every:2", "mean:last:2", "All"]
)
def test_what_is_no_choice_is_refused(tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"is no choice of tokens\. Write all, last, last:k"):
        parse_tokens(tokens)


def test_options_that_contradict_each_other_are_refused_together() -> None:
    values = {"model": "m", "prompts": "p", "output": "o", "tokens": "last:0", "pack": 64, "max_length": 32, "truncation": "cut_left"}
    with pytest.raises(ConfigError) as refused:
        ExtractConfig.validated(values)
    for words in ("tokens = 'last:0'", "pack = 64 makes every sequence as long", "pack = 64 cuts where a sequence is full"):
        assert words in str(refused.value)
