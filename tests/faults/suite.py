"""The suite: a cluster, a disk, an S3 server, and rounds on them until the time is over."""

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random
from unittest.mock import patch

from tests.faults.cluster import ray_cluster
from tests.faults.disk import small_disk
from tests.faults.rounds import NUM_WORKERS, Round, Tally, chosen_faults, make_inputs
from tests.faults.server import faulty_server

_FAULTS_A_ROUND = 12


def play(seed: int, seconds: float, *, with_s3: bool, only: str = "", in_waves: bool = False) -> Tally:
    """Rounds for so long, every fourth in the S3 server."""
    folder, tally = Path(tempfile.mkdtemp(prefix="m2ray-faults-", dir="/tmp")), Tally()
    with ExitStack() as stack:
        server = stack.enter_context(faulty_server()) if with_s3 else None
        stack.enter_context(patch.dict(os.environ, server.env if server else {}))
        disk = stack.enter_context(small_disk(folder / "disk"))
        cluster = stack.enter_context(ray_cluster(NUM_WORKERS, server.env if server else {}))
        inputs = make_inputs(folder / "inputs", cluster, in_waves=in_waves)
        until_s, number = time.monotonic() + seconds, 0
        while time.monotonic() < until_s:
            chance = Random(f"{seed}/{number}")
            place = server if number % 4 == 1 else None
            faults = chosen_faults(chance, _FAULTS_A_ROUND, only, on_s3=place is not None, can_fill=disk.can_fill)
            if faults:
                Round(f"round-{number}", cluster, disk, place, inputs, chance, tally).play(faults, until_s)
            number += 1
    if tally.problems:
        print(f"The drivers' logs are in {folder / 'logs'}.")
    else:
        subprocess.run(["rm", "-rf", folder], check=True, timeout=60)
    return tally
