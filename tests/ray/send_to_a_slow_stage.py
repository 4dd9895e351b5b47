"""A real stage in front of one that takes nothing over until it is told to: what was sent is printed as JSON.

Run by test_transport.py: FOLDER takes the model and the run.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
import ray

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain.actor import actor_class
from m2ray.chain.loading import WriterSpec
from m2ray.model.stage import StageSpec
from m2ray.storage import open_store
from tests.reference import make_family

NUM_STEPS = 6
TIMEOUT_S = 60.0


@ray.remote(num_cpus=0)
class SlowStage:
    def __init__(self):
        self.sent: list[int] = []
        self.allowed = 0
        self.changed = asyncio.Condition()

    async def take(self, epoch, step, attempt, micro_batch, payload):
        async with self.changed:
            self.sent.append(step)
            self.changed.notify_all()
            await asyncio.wait_for(self.changed.wait_for(lambda: step < self.allowed), TIMEOUT_S)

    async def allow(self, steps):
        async with self.changed:
            self.allowed = steps
            self.changed.notify_all()

    async def wait_for(self, count):
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.sent) >= count), TIMEOUT_S)
            return self.sent


def wait_until_computed(stage, count: int) -> None:
    begin = time.monotonic()
    while ray.get(stage.status.remote(), timeout=TIMEOUT_S).micro_batches < count:
        assert time.monotonic() - begin < TIMEOUT_S, f"{count} micro-batches are not computed"


def main() -> None:
    folder = Path(sys.argv[1])
    model = make_family(folder / "llama", "llama")
    open_store(folder / "run").put("job.json", b"{}")
    ray.init(logging_level="ERROR")
    spec = StageSpec(str(model), LayerSpan(0, 2), (), ("residual",), "float32", "float32", "auto", "cpu", 1)
    writer = WriterSpec(str(folder / "run"), {}, 1 << 20, 1, TIMEOUT_S, 128)
    stage = actor_class(NUM_STEPS + 2).options(num_cpus=1).remote([spec], writer, transport="auto", epoch=0)
    slow = SlowStage.remote()
    ray.get(stage.load.remote(), timeout=TIMEOUT_S)
    ray.get(stage.link.remote(slow), timeout=TIMEOUT_S)
    for step in range(NUM_STEPS):
        ids = np.array([step])
        stage.take.remote(0, step, "try", MicroBatch(0, step, False, ids, np.array([4], np.int32), np.ones((1, 4), np.int32)), None)
    found = {"with none taken": ray.get(slow.wait_for.remote(2), timeout=TIMEOUT_S)}
    wait_until_computed(stage, 4)
    found["with two more computed"] = ray.get(slow.wait_for.remote(2), timeout=TIMEOUT_S)
    ray.get(slow.allow.remote(1), timeout=TIMEOUT_S)
    found["with one taken"] = ray.get(slow.wait_for.remote(3), timeout=TIMEOUT_S)
    ray.get(slow.allow.remote(NUM_STEPS), timeout=TIMEOUT_S)
    found["with all taken"] = ray.get(slow.wait_for.remote(NUM_STEPS), timeout=TIMEOUT_S)
    print(json.dumps(found))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
