"""A slice of the fault suite (tests/faults, `scripts/faults`) in an S3 server that goes away, refuses and is slow."""

import pytest

from tests.faults.suite import play
from tests.store.conftest import S3Server


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_in_a_store_that_fails_end_with_the_rows_of_an_undisturbed_one(s3: S3Server) -> None:
    """`s3` says whether a server can be had here; the suite starts one of its own, to end it as it likes."""
    tally = play(seed=1, seconds=25, with_s3=True, only="S3")
    assert not tally.problems
    assert tally.strikes
