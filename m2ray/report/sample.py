"""Which committed sequences the page reads: a few that are spread evenly over the run, and one that is shown word by word."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from m2ray.activations.reading.reader import RunReader
from m2ray.errors import NotInRunError, did_you_mean, shown
from m2ray.selection import NO_TOKEN

MOST_SEQUENCES = 8
MOST_ROWS = 4096
"""In all, of each layer."""

Words = Callable[[Sequence[int]], list[str]]
"""From token ids to the words that they stand for."""


class Sampled(NamedTuple):
    """A committed sequence that has rows."""

    sequence_id: int
    row_id: str
    num_rows: int


def committed(run: RunReader) -> list[Sampled]:
    """All of them, ascending by sequence id; none in a run that keeps no rows. Raises RunDamagedError or StoreError."""
    if not run.job.parts:
        return []
    rows = run.sequences.select(["sequence_id", "row_id", "row_count", "shard"]).to_batches()
    shards = set(run.committed_shards)
    return [
        Sampled(sequence_id, row_id, num_rows)
        for batch in rows
        for sequence_id, row_id, num_rows, shard in zip(*batch.to_pydict().values(), strict=True)
        if num_rows and shard in shards
    ]


def spread(sequences: Sequence[Sampled], most: int = MOST_SEQUENCES, most_rows: int = MOST_ROWS) -> list[Sampled]:
    """At most `most` of them with at most `most_rows` rows in all; where each is longer than that, the shortest."""
    fitting = [each for each in sequences if each.num_rows <= most_rows] or [min(sequences, key=lambda each: each.num_rows)]
    count = min(most, len(fitting))
    chosen: list[Sampled] = []
    for place in range(count):
        candidate = fitting[(2 * place + 1) * len(fitting) // (2 * count)]
        if not chosen or sum(each.num_rows for each in chosen) + candidate.num_rows <= most_rows:
            chosen.append(candidate)
    return chosen


def named(sequences: Sequence[Sampled], row_id: str) -> Sampled:
    """The one with this row id. Raises NotInRunError."""
    found = next((each for each in sequences if each.row_id == row_id), None)
    if found is None:
        near = did_you_mean(row_id, [each.row_id for each in sequences[:10_000]])
        raise NotInRunError(f"No committed sequence with rows has the row id {row_id!r}.", f"{near}`sequences/` has them all.")
    return found


def in_words(token_ids: Sequence[int], words: Words | None) -> list[str]:
    """What each row's token stands for; the ids where the tokenizer is not at hand. Rows of several tokens have no id."""
    return ["(mean)" if each == NO_TOKEN else visible(words([each])[0]) if words else str(each) for each in token_ids]


def visible(word: str) -> str:
    """A word whose spaces and line ends can be seen; a figure, as any XML, takes no control characters."""
    return shown(word.replace(" ", "␣").replace("\n", "⏎"))
