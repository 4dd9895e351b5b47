"""Joining the cluster that RAY_ADDRESS names, or starting one on this machine."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from m2ray.chain.stopping import sigterm_kept
from m2ray.errors import ClusterError


@contextmanager
def cluster(connect_timeout_s: float) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (in a job: the job's own), or start one on this machine and end it after.

    Raises:
        ClusterError: the named cluster does not answer, or refuses the token.
    """
    if os.environ.get("RAY_ADDRESS"):
        _join(connect_timeout_s)
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = Path(tempfile.mkdtemp(prefix="m2ray-"))
    try:
        with sigterm_kept():
            ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), logging_level="ERROR", log_to_driver=True)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _join(timeout_s: float) -> None:
    address = os.environ["RAY_ADDRESS"]
    try:
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in host:
            # Ray itself goes on trying for minutes where nothing listens.
            socket.create_connection((host, int(port)), timeout_s).close()
        with sigterm_kept():
            ray.init(logging_level="ERROR", log_to_driver=True)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"The Ray cluster at RAY_ADDRESS={address!r} cannot be joined: {error}.",
            "Check the address and the token, or unset RAY_ADDRESS to run on this machine.",
        ) from error
