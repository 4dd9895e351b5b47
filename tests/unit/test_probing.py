"""A node that could not be looked at: why, in a line."""

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError

from m2ray.chain.probing import _why

KILLED = (
    "Task was killed due to the node running low on memory.\nMemory on the node was 23GB / 24GB.\nRefer to the documentation on how to ..."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError(KILLED), "Task was killed due to the node running low on memory"),
        (
            RayTaskError("look", "Traceback (most recent call last):\n  File ...\nValueError: no such device\n", ValueError()),
            "no such device",
        ),
    ],
)
def test_what_ray_says_first_and_a_trace_last(error: Exception, said: str) -> None:
    told = _why(error)
    assert said in told
    assert "Refer to" not in told
    assert "Traceback" not in told
