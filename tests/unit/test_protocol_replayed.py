"""m2ray's own code goes the ways of the commit protocol's model, step by step (tests/protocol/replay.py)."""

from pathlib import Path
from random import Random

import pytest

from m2ray.storage import LocalStore
from tests.protocol.replay import replayed


@pytest.mark.parametrize("seed", range(12))
def test_m2rays_own_code_goes_the_models_ways(tmp_path: Path, seed: int) -> None:
    replayed(LocalStore(tmp_path / "run"), tmp_path, (), Random(seed))
