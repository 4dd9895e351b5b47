"""The schedules of the commit protocol's model on a real S3 server; tests/unit/test_protocol.py has the search, and more of them on a disk."""

from pathlib import Path
from random import Random

import pytest

from m2ray.storage import open_store
from tests.protocol.model import BUGS
from tests.protocol.replay import replayed
from tests.protocol.search import search


@pytest.mark.parametrize("seed", range(8))
def test_m2rays_own_code_goes_the_models_ways(url: str, tmp_path: Path, seed: int) -> None:
    replayed(open_store(url), tmp_path, (), Random(seed))


@pytest.mark.parametrize("bug", list(BUGS)[:-1])
def test_what_refutes_another_protocol_does_not_harm_this_one(url: str, tmp_path: Path, bug: str) -> None:
    replayed(open_store(url), tmp_path, search(BUGS[bug], bug).way, Random(1))
