"""A model of the commit protocol with one defect planted: the search finds a way that breaks a promise."""

import pytest

from tests.protocol.model import BUGS
from tests.protocol.search import search


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_defect_is_found(bug: str) -> None:
    found = search(BUGS[bug], bug)
    assert found.problem, f"{found.num_states} states and no problem"
