"""The commit protocol: every state of its model is searched, and planted defects are found."""

import pytest

from tests.protocol.model import BUGS, begun
from tests.protocol.search import search


@pytest.mark.parametrize(
    ("shards", "faults", "strikes", "num_states"), [(2, 0, 0, 7_509), (2, 1, 0, 129_079), (2, 0, 1, 94_084), (1, 1, 1, 370_763)]
)
def test_no_way_breaks_a_promise(shards: int, faults: int, strikes: int, num_states: int) -> None:
    found = search(begun(shards, faults=faults, strikes=strikes))
    assert (found.problem, found.way) == ("", ())
    assert found.num_states == num_states, "docs/decisions/the-commit-protocol-modelled.md says how many there are"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_defect_is_found(bug: str) -> None:
    found = search(BUGS[bug], bug)
    assert found.problem, f"{found.num_states} states and no problem"
