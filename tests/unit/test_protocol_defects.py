"""A model of the commit protocol with one defect planted: the search finds a way that breaks a promise, which does not break m2ray's own code's."""

from functools import cache
from pathlib import Path
from random import Random

import pytest

from m2ray.storage import LocalStore
from tests.protocol.model import BUGS
from tests.protocol.replay import replayed
from tests.protocol.search import Found, search


@cache
def refuted(bug: str) -> Found:
    return search(BUGS[bug], bug)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_defect_is_found(bug: str) -> None:
    found = refuted(bug)
    assert found.problem, f"{found.num_states} states and no problem"


@pytest.mark.parametrize("bug", BUGS)
def test_what_refutes_another_protocol_does_not_harm_this_one(tmp_path: Path, bug: str) -> None:
    replayed(LocalStore(tmp_path / "run"), tmp_path, refuted(bug).way, Random(1))
