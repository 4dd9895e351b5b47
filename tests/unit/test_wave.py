"""Which micro-batches go through a stage together, and when they begin."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from m2ray.chain.wave import MOST_BATCHES, Entered, Gathering, most_in_chain


def entered(step: int, padded_tokens: int = 10) -> Entered:
    micro_batch: Any = SimpleNamespace(padded_tokens=padded_tokens)
    return Entered(step, "attempt", micro_batch, None)


def steps(waves: Iterable[list[Entered]]) -> list[list[int]]:
    return [[each.step for each in wave] for wave in waves]


def joined(gathering: Gathering, *batches: Entered) -> list[list[int]]:
    return [wave for each in batches for wave in steps(gathering.join(each))]


def test_without_waves_nothing_waits() -> None:
    for limit_tokens in (0, 15):
        assert joined(Gathering(limit_tokens), *map(entered, range(3))) == [[0], [1], [2]]


def test_a_wave_begins_when_another_like_the_last_would_not_fit() -> None:
    assert joined(Gathering(39), *map(entered, range(7))) == [[0, 1, 2], [3, 4, 5]]
    assert joined(Gathering(40), entered(0, 10), entered(1, 31), entered(2, 5), entered(3, 5), entered(4, 99)) == [[0], [1], [2, 3], [4]]


def test_a_wave_has_no_more_micro_batches_than_a_stage_has_threads_for() -> None:
    assert joined(Gathering(1 << 30), *map(entered, range(MOST_BATCHES))) == [list(range(MOST_BATCHES))]
    wave, alone = SimpleNamespace(wave_tokens=100), SimpleNamespace(wave_tokens=0)
    assert most_in_chain([[alone, wave], [alone]]) == 3 * MOST_BATCHES  # type: ignore[list-item]
    assert most_in_chain([[alone], [alone]]) == 6  # type: ignore[list-item]


def test_a_mark_begins_a_wave_once_its_micro_batch_is_there() -> None:
    """It may come before that one, or after it."""
    gathering = Gathering(1000)
    assert steps(gathering.mark(1)) == []
    assert joined(gathering, entered(0), entered(1), entered(2)) == [[0, 1]]
    assert steps(gathering.mark(1)) == [], "of a wave that has begun"
    assert steps(gathering.mark(2)) == [[2]]
    assert joined(gathering, entered(3), entered(4)) == []
    assert steps(gathering.mark(3)) == [[3, 4]], "what came behind it goes along"


def test_what_waited_in_an_epoch_that_is_over_is_in_no_wave() -> None:
    gathering = Gathering(1000)
    assert joined(gathering, entered(0), entered(1)) == []
    assert steps(gathering.mark(7)) == []
    gathering.drop()
    assert joined(gathering, entered(0)) == []
    assert steps(gathering.mark(0)) == [[0]]
