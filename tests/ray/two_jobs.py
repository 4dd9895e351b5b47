"""One loaded chain does two jobs one after the other, once one is refused: what the stages say of each is printed as JSON. In the first job the
first stage is killed while the second one's wave may be half full.

    python two_jobs.py MODEL PROMPTS OUTPUT LAYERS OUTPUT LAYERS

The weights lie elsewhere while the second is done. Both stages take waves, of layers of which some are ready, and play that they are on GPUs, so that a
process beside each writes its rows. Run by test_two_jobs.py.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan
from m2ray.chain import actors, beginning, extract
from m2ray.chain.actor import StageActor, concurrency_groups
from m2ray.chain.actors import Actors
from m2ray.chain.checking import look
from m2ray.chain.driver import Chain, ShardAttempt
from m2ray.chain.failure import cause_of
from m2ray.chain.job import Job
from m2ray.chain.placement import Reservation, Room
from m2ray.chain.progress import Progress
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.config import ExtractConfig
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec
from m2ray.prompts import batching, survey
from tests.played_gpu import play_for_good

TIMEOUT_S = 120.0
OPTIONS = {"compute_dtype": "float32", "store_dtype": "float32", "id_column": "id", "shard_tokens": 300, "compile": False}


class Played(StageActor):
    """A stage on a CPU that takes the ways of a GPU's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        play_for_good()
        super().__init__(*arguments, **options)


def played(num_take_threads: int) -> Any:
    """As m2ray.chain.actor.actor_class."""
    groups = concurrency_groups(num_take_threads)
    return ray.remote(concurrency_groups=groups, allow_out_of_order_execution=True, max_restarts=0, max_task_retries=0)(Played)


def do(stages: Stages, model: str, prompts: str, output: str, layers: str, batch_tokens: int, killed: int = -1) -> list[dict[str, int]]:
    """Extract into one folder, and give what the stages say then. After the first shard the process of stage `killed` is killed."""
    inputs = look(ExtractConfig(model=model, prompts=prompts, output=output, layers=layers, batch_tokens=batch_tokens, **OPTIONS))
    progress = Progress(sys.stderr)
    found = survey(inputs.source, inputs.tokenizer, inputs.store, uuid4().hex[:12], 300, on_progress=progress.surveying)
    run = beginning._claim(inputs, found, batching(found.shards, batch_tokens), progress)
    assert run is not None, "nobody else begins it"
    work = beginning.Work(inputs, run, found.shards, run.missing(found.shards), found.tokens, None)
    capture = CaptureSpec({"residual": inputs.options.layers}, "float32")
    stages.begin(Job(capture, WriterSpec(output, run.job.run_metadata(), 1 << 20, 1), batch_tokens))
    limits = {"in_flight_bytes": 1 << 20, "hidden_bytes": 4 * inputs.table.hidden_size, "timeout_s": TIMEOUT_S}
    chain = Chain(stages, extract._micro_batches_of(work), batch_tokens, progress.say, **limits)
    queue = ShardQueue(work.shards)

    committed: list[int] = []

    def commit(result: ShardAttempt) -> None:
        run.commit(result.shard, result.attempt, result.receipts, result.micro_batches, result.elapsed_s)
        queue.finish(result.shard)
        committed.append(result.shard.index)
        if killed >= 0 and len(committed) == 1:
            os.kill(stages.statuses[killed].pid, signal.SIGKILL)

    with found.tokens:
        chain.run(queue, commit)
    run.finish()
    stages.ask_all()
    return [{name: getattr(status, name) for name in ("pid", "read_bytes", "tokens", "written_bytes")} for status in stages.statuses]


def refusal(stages: Stages, output: str) -> list[str | int]:
    """What a job into a folder that is not there fails with, and the bytes that were read before."""
    stages.begin(Job(CaptureSpec({}, "float32"), WriterSpec(output, {}, 1 << 20, 1), 128))
    stages.start()
    try:
        stages.load(threading.Event())
    except RayError as error:
        stages.ask_all()
        return [type(cause_of(error)).__name__, sum(status.read_bytes for status in stages.statuses)]
    return ["none"]


def main() -> None:
    model, prompts, first, first_layers, second, second_layers = sys.argv[1:]
    started: Any = actors
    started.actor_class = played
    ray.init(logging_level="ERROR")
    node = ray.nodes()[0]
    reservation = Reservation([Room(node["NodeManagerAddress"], node["NodeID"], 0, 1.0)] * 2, {})
    reservation.wait(TIMEOUT_S)
    num_layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    waves: dict[str, Any] = {"residency": {0: "host", 2: "host", 4: "host", 6: "host"}, "wave_tokens": 500}
    specs = [[StageSpec(model, span, "float32", "auto", "cpu", 1, **waves)] for span in (LayerSpan(0, 3), LayerSpan(3, num_layers))]
    stages = Stages(specs, Actors(specs, reservation, "auto", TIMEOUT_S, TIMEOUT_S), timeout_s=TIMEOUT_S)
    found = [refusal(stages, f"{first}-not-there"), do(stages, model, prompts, first, first_layers, 128, killed=0)]
    away = Path(model).with_name("away")
    away.mkdir()
    for file in Path(model).glob("*.safetensors"):
        (away / file.name).write_bytes(file.read_bytes())
        file.write_bytes(file.read_bytes()[:-1000] + bytes(1000))  # as large as before, and other weights
    found.append(do(stages, model, prompts, second, second_layers, 200))
    for file in away.iterdir():
        file.rename(Path(model) / file.name)
    stages.close()
    reservation.release()
    print(json.dumps(found))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
