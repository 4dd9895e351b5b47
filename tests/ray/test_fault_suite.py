"""A slice of the fault suite (tests/faults, `scripts/faults`) on the disk."""

import pytest

from tests.faults.suite import play


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_struck_runs_end_with_the_rows_of_an_undisturbed_one() -> None:
    tally = play(seed=20, seconds=25, with_s3=False)  # a seed whose first faults are of five kinds, none of which waits for a timeout
    assert not tally.problems
    assert tally.kills > 0
