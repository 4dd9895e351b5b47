"""A chain of several actors against the same layers in one process, at MiniMax-M2's real dimensions, by each way of transport.

On one GPU the stages share it, which shows that receiving, handing on and the driver hide behind computation. On several, each stage
has one (or an equal share), and the chain is held against as many times the one process. As many processes side by side, each with a
stage's layers and handing nothing on, tell what the GPUs give to so many at all. Nothing is captured. Needs 24 GB and 8 GB more a layer
on the first GPU, and 4 GB of disk a layer.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.checkpoints import free, real_size
from benchmarks.records import Row, record
from m2ray import __version__
from m2ray.activations.job import JOB_KEY, Counts, JobRecord, ModelFacts
from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch, Shard
from m2ray.chain.actors import Actors
from m2ray.chain.driver import Chain, ShardAttempt
from m2ray.chain.job import Job
from m2ray.chain.placement import Reservation, Room
from m2ray.chain.queue import ShardQueue
from m2ray.chain.stages import Stages
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import DTYPES, Stage, StageSpec, load_stage
from m2ray.option_types import Transport
from m2ray.planning.memory import window
from m2ray.storage import open_store

SHAPE = (32, 512) if torch.cuda.is_available() else (2, 16)
WARM, MEASURED, FOLLOWING = 16, 60, 16
"""Micro-batches. Of those that follow, as many are in the chain when the clock stops as there were when it started: on one GPU what the
first stages have done ahead would count otherwise."""
START_S, END_S = 300.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--stages", default="2,3,4")
    parser.add_argument("--transports", default="object_store,cuda_ipc")
    parser.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    parser.add_argument("--overrides", default="{}", help="JSON, for a try without a GPU")
    arguments = parser.parse_args()
    model = real_size(arguments.folder, arguments.layers, json.loads(arguments.overrides))
    chains = Chains(model, json.loads((model / "config.json").read_text())["vocab_size"], arguments.layers, arguments.gpus)
    counts = [int(text) for text in arguments.stages.split(",")]
    assert window(max(counts)) <= min(WARM, FOLLOWING), "fewer micro-batches would not keep the chain full while the clock runs"
    before, milliseconds = chains.in_one_process()
    layers = ", ".join(f"{each:.2f}" for each in milliseconds) + " ms"
    print(f"one process: {before:,.0f} tokens/s; layers {layers}", flush=True)
    alone = {num_stages: chains.side_by_side(num_stages) for num_stages in counts}
    print(f"side by side: {alone}", flush=True)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=16, num_gpus=arguments.gpus, include_dashboard=False, _temp_dir=folder, logging_level="ERROR")
        for num_stages in counts:
            for transport in arguments.transports.split(","):
                measured.append((num_stages, transport, *chains.in_a_chain(num_stages, transport)))
                print(*measured[-1], flush=True)
        ray.shutdown()
    after, _ = chains.in_one_process()
    baseline = statistics.mean((before, after)) * max(1, arguments.gpus)
    times = "" if arguments.gpus < 2 else f"{arguments.gpus} times "
    note = f"one process before {before:,.0f}, after {after:,.0f}, its layers {layers}; as many side by side that hand nothing on "
    rows = [
        Row(
            f"{num_stages} stages, {transport}",
            tokens_per_s,
            "tokens/s",
            baseline,
            f"{times}one process, the same layers without a chain",
            tokens_per_s / baseline,
            "0.95",
            f"{note}{alone[num_stages]:,.0f}: {tokens_per_s / alone[num_stages]:.3f} of it; "
            f"share of each stage's time without computation: {idle}; hidden states sent by {ways}",
        )
        for num_stages, transport, tokens_per_s, idle, ways in measured
    ]
    where = "one GPU" if arguments.gpus == 1 else f"{arguments.gpus} GPUs"
    title = f"Chains over {arguments.layers} layers at MiniMax-M2's real dimensions, on {where}"
    record(f"chain_on_{arguments.gpus}_gpus", title, rows)


def spec(model: Path, span: LayerSpan, device: str, *, compiled: bool) -> StageSpec:
    return StageSpec(str(model), span, "bfloat16", "auto", device, 1, compile=compiled)


def micro_batches(shard: Shard, vocab_size: int) -> Iterator[MicroBatch]:
    rng = np.random.default_rng(shard.index)
    count = len(shard.sequence_ids) // SHAPE[0]
    for index in range(count):
        token_ids_BT = rng.integers(0, vocab_size, SHAPE).astype(np.int32)
        ids = shard.sequence_ids[index * SHAPE[0] : (index + 1) * SHAPE[0]]
        yield MicroBatch(shard.index, index, index == count - 1, ids, np.full(SHAPE[0], SHAPE[1], np.int32), token_ids_BT)


def shards() -> list[Shard]:
    bounds = np.cumsum([0, WARM * SHAPE[0], MEASURED * SHAPE[0], FOLLOWING * SHAPE[0]])
    return [
        Shard(index, np.arange(start, stop), np.full(stop - start, SHAPE[1], np.int32))
        for index, (start, stop) in enumerate(pairwise(bounds.tolist()))
    ]


def spans(num_layers: int, num_stages: int) -> list[LayerSpan]:
    bounds = [number * num_layers // num_stages for number in range(num_stages + 1)]
    return [LayerSpan(start, stop) for start, stop in pairwise(bounds)]


def run_beside(spec: StageSpec, together: Barrier, vocab_size: int) -> None:
    """One of several processes: its stage's micro-batches, between the moments when all are ready and when all are done."""
    stage = load_stage(spec, lambda *_: None)
    stage.warm_up(SHAPE[0] * SHAPE[1])
    warm, measured, _ = (list(micro_batches(shard, vocab_size)) for shard in shards())
    boundary = None
    if not stage.is_first:
        shape = (*SHAPE, stage.handed_bytes // DTYPES[spec.compute_dtype].itemsize)
        with torch.inference_mode():
            hidden_BTH = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(spec.device, DTYPES[spec.compute_dtype])
        boundary = Boundary(hidden_BTH)
    for batches in (warm, measured):
        for micro_batch in batches:
            stage.forward(micro_batch, boundary)
        synchronize(spec.device)
        together.wait(START_S)


def layers_ms(stage: Stage, micro_batch: MicroBatch) -> list[float]:
    """Milliseconds that each layer of a span takes on the GPU's own clock, the embedding with the first."""
    events = [torch.cuda.Event(enable_timing=True)]
    token_ids_BT = torch.from_numpy(micro_batch.token_ids_BT).to("cuda", torch.int64)

    def mark(*_: object) -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    events[0].record()
    with torch.inference_mode():
        stage._decoder.run(token_ids_BT, None, mark)  # noqa: SLF001 - the span without a capture
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Chains:
    """The two members, over the same layers and micro-batches."""

    model: Path
    vocab_size: int
    num_layers: int
    num_gpus: int

    @property
    def device(self) -> str:
        return "cuda:0" if self.num_gpus else "cpu"

    def in_one_process(self) -> tuple[float, list[float]]:
        """Tokens a second, and milliseconds of each layer: of unequal ones no cut makes equal stages. Leaves nothing on the GPU."""
        stage = load_stage(spec(self.model, LayerSpan(0, self.num_layers), self.device, compiled=bool(self.num_gpus)), lambda *_: None)
        stage.warm_up(SHAPE[0] * SHAPE[1])
        warm, measured, _ = (list(micro_batches(shard, self.vocab_size)) for shard in shards())
        for micro_batch in warm:
            stage.forward(micro_batch, None)
        synchronize(self.device)
        began = time.perf_counter()
        for micro_batch in measured:
            stage.forward(micro_batch, None)
        synchronize(self.device)
        elapsed_s = time.perf_counter() - began
        milliseconds = np.median([layers_ms(stage, micro_batch) for micro_batch in warm], axis=0).tolist() if self.num_gpus else []
        del stage
        free()
        return MEASURED * SHAPE[0] * SHAPE[1] / elapsed_s, milliseconds

    def side_by_side(self, num_stages: int) -> float:
        """Tokens a second through all layers, by processes that run at one time and wait for nobody."""
        context = multiprocessing.get_context("spawn")
        together = context.Barrier(num_stages + 1)
        processes = []
        for number, span in enumerate(spans(self.num_layers, num_stages)):
            device = f"cuda:{number % self.num_gpus}" if self.num_gpus else "cpu"
            arguments = (spec(self.model, span, device, compiled=bool(self.num_gpus)), together, self.vocab_size)
            processes.append(context.Process(target=run_beside, args=arguments))
            processes[-1].start()
        try:
            together.wait(START_S)
            began = time.perf_counter()
            together.wait(START_S)
            elapsed_s = time.perf_counter() - began
        finally:
            for process in processes:
                process.join(END_S)
                process.kill()
        return MEASURED * SHAPE[0] * SHAPE[1] / elapsed_s

    def in_a_chain(self, num_stages: int, transport: Transport) -> tuple[float, str, str]:
        """As `through`, of a chain that is loaded for it."""
        with self.stages(num_stages, transport) as stages:
            return self.through(stages)

    @contextmanager
    def stages(self, num_stages: int, transport: Transport) -> Iterator[Stages]:
        """A chain's stages, not yet started; they end with the context."""
        specs = [[spec(self.model, span, self.device, compiled=bool(self.num_gpus))] for span in spans(self.num_layers, num_stages)]
        node = ray.nodes()[0]
        room = Room(node["NodeManagerAddress"], node["NodeID"], self.num_gpus / num_stages, 1.0)
        reservation = Reservation([room] * num_stages, {})
        reservation.wait(60.0)
        stages = Stages(specs, Actors(specs, reservation, transport, 600.0, 60.0), timeout_s=600.0)
        try:
            yield stages
        finally:
            stages.close()
            reservation.release()

    def _job(self) -> JobRecord:
        """A run's record, which each stage looks for before it loads; of no prompts and no parts."""
        model = ModelFacts("minimax_m2", self.num_layers, 1)
        sequences = sum(len(shard.sequence_ids) for shard in shards())
        counts = Counts(sequences, sequences, 0, sum(shard.num_tokens for shard in shards()))
        named: dict[str, Any] = {
            "options": {},
            "fingerprints": {"model": "-", "tokenizer": "-"},
            "parts": (),
            "sequence_files": (),
            "names": {},
        }
        return JobRecord.new(m2ray_version=__version__, model=model, num_shards=len(shards()), counts=counts, **named)

    def through(self, stages: Stages) -> tuple[float, str, str]:
        """(tokens a second between the end of the first shard and the end of the second, idle shares, ways that were taken)."""
        hidden_size = json.loads((self.model / "config.json").read_text())["hidden_size"]
        with tempfile.TemporaryDirectory() as folder:
            open_store(folder).put(JOB_KEY, self._job().to_json())
            stages.begin(Job(CaptureSpec({}, "bfloat16"), WriterSpec(folder, {}, 1 << 30, 1), SHAPE[0] * SHAPE[1]))
            limits: dict[str, Any] = {"in_flight_bytes": 16 << 30, "hidden_bytes": hidden_size * 2, "timeout_s": 600.0}
            chain = Chain(stages, lambda shard, _: micro_batches(shard, self.vocab_size), SHAPE[0] * SHAPE[1], print, **limits)
            ended: list[float] = []
            queue = ShardQueue(shards())

            def take(result: ShardAttempt) -> None:
                ended.append(time.perf_counter())
                queue.finish(result.shard)

            runner = threading.Thread(target=chain.run, args=(queue, take))
            runner.start()
            runner.join(900.0)
            assert len(ended) == len(shards()), "the chain failed, and said why above"
            stages.ask_all()
        idle = ", ".join(f"{status.wait_s / (status.wait_s + status.compute_s):.2f}" for status in stages.statuses)
        ways = ", ".join(status.sends_by for status in stages.statuses[:-1])
        return MEASURED * SHAPE[0] * SHAPE[1] / (ended[1] - ended[0]), idle, ways


if __name__ == "__main__":
    main()
