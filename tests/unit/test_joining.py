"""A Ray of this machine's own that does not start."""

from typing import NoReturn

import pytest
import ray

from m2ray.chain.joining import cluster
from m2ray.errors import ClusterError


def test_a_ray_that_does_not_start_in_time_is_told_in_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where the temporary folder fills while it starts."""

    def init(**_: object) -> NoReturn:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - what Ray raises

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ClusterError, match=r"could not be started on this machine: The current node.*Free: .* bytes in .*TMPDIR"),
        cluster(1),
    ):
        pytest.fail("it started")
