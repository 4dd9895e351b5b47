"""The commit protocol with a request that goes astray and a strike: the largest search of its model, by itself since it takes as long as all others."""

from tests.protocol.model import begun
from tests.protocol.search import search


def test_no_way_breaks_a_promise() -> None:
    found = search(begun(1, faults=1, strikes=1))
    assert (found.problem, found.way) == ("", ())
    assert found.num_states == 476_174, "docs/decisions/the-commit-protocol-modelled.md says how many there are"
