"""A chain of several actors on fractions of one GPU against the same layers in one process, at MiniMax-M2's real dimensions.

What one GPU can show of a chain: that receiving, handing on and the driver hide behind computation. Nothing is captured. The single
process gives its weights back while a chain runs. Needs a CUDA device with 32 GB and 8 GB more a layer, and 4 GB of disk a layer.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import ray
import torch

from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.records import Row, record
from m2ray.batches import LayerSpan, MicroBatch, Shard
from m2ray.chain.actor import WriterSpec
from m2ray.chain.driver import Chain, ChainLimits, ShardResult
from m2ray.chain.placement import Reservation, Room
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Patience, Stages
from m2ray.model.stage import StageSpec, load_stage
from m2ray.planning.memory import window
from m2ray.storage import open_store

SHAPE = (32, 512) if torch.cuda.is_available() else (2, 16)
WARM, MEASURED = 16, 60
"""Micro-batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--stages", default="2,3,4")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--overrides", default="{}", help="JSON, for a try without a GPU")
    arguments = parser.parse_args()
    model = real_size(arguments.folder, arguments.layers, json.loads(arguments.overrides))
    config = json.loads((model / "config.json").read_text())
    on_gpu = arguments.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=16, num_gpus=int(on_gpu), include_dashboard=False, _temp_dir=folder, logging_level="ERROR")
        rows: list[Row] = []
        before = in_one_process(model, arguments.layers, config["vocab_size"], arguments.device)
        for num_stages in map(int, arguments.stages.split(",")):
            chained, idle = in_a_chain(model, config, arguments.layers, num_stages, arguments.device)
            after = in_one_process(model, arguments.layers, config["vocab_size"], arguments.device)
            rows.append(row(num_stages, chained, idle, before, after))
            before = after
        ray.shutdown()
    record("chain_on_one_gpu", f"Chains over {arguments.layers} layers at MiniMax-M2's real dimensions, on one GPU", rows)


def spec(model: Path, span: LayerSpan, device: str, *, compiled: bool) -> StageSpec:
    return StageSpec(str(model), span, (), ("residual",), "bfloat16", "bfloat16", "auto", device, 1, compile=compiled)


def row(num_stages: int, chained: float, idle: str, before: float, after: float) -> Row:
    """Both members in one run, one after the other, the single process before and after the chain."""
    baseline = statistics.mean((before, after))
    return Row(
        f"{num_stages} stages",
        chained,
        "tokens/s",
        baseline,
        "one process, the same layers without a chain",
        chained / baseline,
        "0.95",
        f"one process before {before:,.0f}, after {after:,.0f}; share of each stage's time without computation: {idle}",
    )


def micro_batches(shard: Shard, vocab_size: int) -> Iterator[MicroBatch]:
    rng = np.random.default_rng(shard.index)
    count = len(shard.sequence_ids) // SHAPE[0]
    for index in range(count):
        token_ids_BT = rng.integers(0, vocab_size, SHAPE).astype(np.int32)
        ids = shard.sequence_ids[index * SHAPE[0] : (index + 1) * SHAPE[0]]
        yield MicroBatch(shard.index, index, index == count - 1, ids, np.full(SHAPE[0], SHAPE[1], np.int32), token_ids_BT)


def shards() -> list[Shard]:
    bounds = np.cumsum([0, WARM * SHAPE[0], MEASURED * SHAPE[0]])
    return [
        Shard(index, np.arange(bounds[index], bounds[index + 1]), np.full(bounds[index + 1] - bounds[index], SHAPE[1], np.int32))
        for index in range(2)
    ]


def in_one_process(model: Path, num_layers: int, vocab_size: int, device: str) -> float:
    """Tokens a second."""
    stage = load_stage(spec(model, LayerSpan(0, num_layers), device, compiled=device != "cpu"), lambda *_: None)
    stage.warm_up(SHAPE[0] * SHAPE[1])
    batches = [list(micro_batches(shard, vocab_size)) for shard in shards()]
    for micro_batch in batches[0]:
        stage.forward(micro_batch, None)
    synchronize()
    began = time.perf_counter()
    for micro_batch in batches[1]:
        stage.forward(micro_batch, None)
    synchronize()
    rate = MEASURED * SHAPE[0] * SHAPE[1] / (time.perf_counter() - began)
    del stage
    free()
    return rate


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_a_chain(model: Path, config: dict[str, int], num_layers: int, num_stages: int, device: str) -> tuple[float, str]:
    """(tokens a second between the end of the first shard and the end of the second, idle shares)."""
    bounds = [number * num_layers // num_stages for number in range(num_stages + 1)]
    specs = [[spec(model, LayerSpan(start, stop), device, compiled=device != "cpu")] for start, stop in pairwise(bounds)]
    node = ray.nodes()[0]
    room = Room(node["NodeManagerAddress"], node["NodeID"], 0.0 if device == "cpu" else 1 / num_stages, 1.0)
    reservation = Reservation([room] * num_stages)
    reservation.wait(60.0)
    with tempfile.TemporaryDirectory() as folder:
        open_store(folder).put("job.json", b"{}")
        writer = WriterSpec(folder, {}, 1 << 30, 1, 600.0, SHAPE[0] * SHAPE[1])
        stages = Stages(specs, writer, reservation, Patience(600.0, 60.0), window(num_stages))
        limits = ChainLimits(16 << 30, config["hidden_size"], 2, 600.0)
        chain = Chain(stages, limits, lambda shard, _: micro_batches(shard, config["vocab_size"]), SHAPE[0] * SHAPE[1], print)
        ended: list[float] = []
        queue = ShardQueue(shards())

        def take(result: ShardResult) -> None:
            ended.append(time.perf_counter())
            queue.finish(result.shard)

        runner = threading.Thread(target=chain.run, args=(queue, take))
        runner.start()
        runner.join(900.0)
        stages.ask_all()
        idle = ", ".join(f"{status.wait_s / (status.wait_s + status.compute_s):.2f}" for status in stages.statuses)
        stages.close()
        reservation.release()
    return MEASURED * SHAPE[0] * SHAPE[1] / (ended[1] - ended[0]), idle


if __name__ == "__main__":
    main()
