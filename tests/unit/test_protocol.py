"""The commit protocol: every state of its model is searched, planted defects are found, and m2ray's own code goes the model's ways."""

from pathlib import Path
from random import Random

import pytest

from m2ray.storage import LocalStore
from tests.protocol import lease_model
from tests.protocol.model import BUGS, World
from tests.protocol.replay import replayed
from tests.protocol.search import search


def test_no_way_breaks_a_promise() -> None:
    found = search(World())
    assert (found.problem, found.way) == ("", ())
    assert found.num_states > 100_000


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_defect_is_found(bug: str) -> None:
    found = search(World(), bug)
    assert found.problem, f"{found.num_states} states and no problem"


@pytest.mark.parametrize("seed", range(40))
def test_m2rays_own_code_goes_the_models_ways(tmp_path: Path, seed: int) -> None:
    replayed(LocalStore(tmp_path / "run"), tmp_path, (), Random(seed))


@pytest.mark.parametrize("bug", BUGS)
def test_what_refutes_another_protocol_does_not_harm_this_one(tmp_path: Path, bug: str) -> None:
    replayed(LocalStore(tmp_path / "run"), tmp_path, search(World(), bug).way, Random(1))


def test_the_lease_keeps_two_drivers_apart_as_long_as_both_give_signs() -> None:
    num_states, problem = lease_model.search()
    assert problem == ""
    assert num_states > 1_000


@pytest.mark.parametrize("bug", lease_model.BUGS)
def test_a_planted_defect_of_the_lease_is_found(bug: str) -> None:
    assert lease_model.search(bug)[1]
