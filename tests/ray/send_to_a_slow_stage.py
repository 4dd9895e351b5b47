"""A real stage in front of one that takes nothing over until it is told to: which steps were sent is printed as JSON.

Run by test_transport.py: FOLDER takes the model and the run.
"""

import asyncio
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import ray

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain.actor import actor_class
from m2ray.chain.job import Job
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec
from tests.reference import make_family

NUM_STEPS = 6
TIMEOUT_S = 60.0
LOAD_S = 120.0


@ray.remote(num_cpus=0)
class SlowStage:
    """Takes the first `allowed` steps of an epoch over, and lets all others wait."""

    def __init__(self):
        self.sent: dict[int, list[int]] = defaultdict(list)
        self.allowed: dict[int, int] = defaultdict(int)
        self.changed = asyncio.Condition()

    async def take(self, epoch, step, attempt, micro_batch, payload):
        async with self.changed:
            self.sent[epoch].append(step)
            self.changed.notify_all()
            await asyncio.wait_for(self.changed.wait_for(lambda: step < self.allowed[epoch]), LOAD_S)

    async def allow(self, epoch, steps):
        async with self.changed:
            self.allowed[epoch] = steps
            self.changed.notify_all()

    async def wait_for(self, epoch, count):
        """All that were sent, once there are so many; Ray may hand them over in any order."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.sent[epoch]) >= count), TIMEOUT_S)
            return sorted(self.sent[epoch])


def wait_until_computed(stage, count: int) -> None:
    begin = time.monotonic()
    while ray.get(stage.status.remote(), timeout=TIMEOUT_S).micro_batches < count:
        assert time.monotonic() - begin < TIMEOUT_S, f"{count} micro-batches are not computed"
        time.sleep(0.05)


def send_all(stage, epoch: int) -> None:
    for step in range(NUM_STEPS):
        micro_batch = MicroBatch(0, step, False, np.array([step]), np.array([4], np.int32), np.ones((1, 4), np.int32))
        stage.take.remote(epoch, step, f"attempt {epoch}", micro_batch, None)


def main() -> None:
    folder = Path(sys.argv[1])
    model = make_family(folder / "llama", "llama")
    ray.init(logging_level="ERROR")
    spec = StageSpec(str(model), LayerSpan(0, 2), "float32", "auto", "cpu", 1)
    stage = actor_class(2 * NUM_STEPS).options(num_cpus=1).remote([spec], transport="auto", timeout_s=TIMEOUT_S, epoch=0)
    job = Job(CaptureSpec({}, "float32"), WriterSpec(str(folder / "run"), {}, 1 << 20, 1), 128)
    slow = SlowStage.remote()
    ray.get(stage.load.remote(), timeout=LOAD_S)
    ray.get(stage.begin.remote(job), timeout=LOAD_S)
    ray.get(stage.link.remote(slow), timeout=TIMEOUT_S)

    def sent(epoch: int, count: int) -> list[int]:
        return ray.get(slow.wait_for.remote(epoch, count), timeout=TIMEOUT_S)

    found = {}
    send_all(stage, epoch=0)
    found["none taken"] = sent(0, 2)
    wait_until_computed(stage, 4)
    found["two more computed"] = sent(0, 2)
    ray.get(slow.allow.remote(0, 1), timeout=TIMEOUT_S)
    found["one taken"] = sent(0, 3)
    ray.get(stage.reset.remote(1, [(0, "attempt 0")]), timeout=TIMEOUT_S)
    send_all(stage, epoch=1)
    found["begun anew, none taken"] = sent(1, 2)
    ray.get(slow.allow.remote(1, NUM_STEPS), timeout=TIMEOUT_S)
    found["begun anew, all taken"] = sent(1, NUM_STEPS)
    print(json.dumps(found))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
