"""The commit protocol: every state of its model is searched."""

import pytest

from tests.protocol.model import begun
from tests.protocol.search import search


@pytest.mark.parametrize(("shards", "faults", "strikes", "num_states"), [(2, 0, 0, 13_057), (2, 1, 0, 198_695), (2, 0, 1, 152_524)])
def test_no_way_breaks_a_promise(shards: int, faults: int, strikes: int, num_states: int) -> None:
    found = search(begun(shards, faults=faults, strikes=strikes))
    assert (found.problem, found.way) == ("", ())
    assert found.num_states == num_states, "docs/decisions/the-commit-protocol-modelled.md says how many there are"
