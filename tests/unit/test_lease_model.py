"""The lease: every state of its model is searched."""

import pytest

from tests.protocol.lease import BUGS, search


@pytest.mark.parametrize("pauses", [0, 1])
def test_no_two_drivers_hold_the_lease(pauses: int) -> None:
    _, problem, way = search(pauses)
    assert (problem, way) == ("", ())


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_defect_is_found(bug: str) -> None:
    assert search(1, bug)[1]
