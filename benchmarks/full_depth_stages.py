"""The parts of benchmarks/full_depth.py below `m2ray extract`: each stage alone on its GPU, and one loaded chain that hands on by either transport."""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import ray
import torch

from benchmarks.chain_on_gpus import START_S, Chains, spans, synchronize
from benchmarks.checkpoints import free
from benchmarks.depth import BATCH_TOKENS, Depth
from benchmarks.gpu_stage import DROP_CACHES, drop_caches
from benchmarks.records import Row
from benchmarks.runs import peak_rss_bytes
from m2ray.batches import MicroBatch
from m2ray.chain.stages import Stages
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import DTYPES, Stage, StageSpec, load_stage
from m2ray.option_types import Transport

ROUNDS = 2
"""Of each transport."""


# -- each stage alone -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """One stage's two loadings and its pass over all micro-batches, at the same time as the other stages' but apart from them.

    Attributes:
        load_s, first_s: seconds to the last layer and at most to the first one, of each loading.
        host_bytes: that the first loading added to the process at its peak.
        compute_s: of all micro-batches, every row that the job keeps in host memory.
    """

    number: int
    read_bytes: int
    load_s: tuple[float, ...]
    first_s: tuple[float, ...]
    host_bytes: int
    compute_s: float


def alone(depth: Depth, _: argparse.Namespace) -> None:
    """Loading from the disk and from memory, and the rates that a chain of these stages cannot exceed."""
    prompts = depth.made_prompts()
    if os.access(DROP_CACHES, os.W_OK) and not depth.tiny:
        drop_caches()
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(depth.stages), context.Queue()
    processes = []
    for number, span in enumerate(spans(depth.layers, depth.stages)):
        device = "cpu" if depth.tiny else f"cuda:{number}"
        spec = StageSpec(str(depth.model), span, "bfloat16", "auto", device, None, compile=not depth.tiny)
        arguments = (number, spec, prompts.batches, depth.few, together, results)
        processes.append(context.Process(target=measure, args=arguments))
        processes[-1].start()
    try:
        found = sorted(_results(processes, results), key=lambda each: each.number)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    rows = [*loading_rows(found), *efficiency_rows(depth, found, prompts.num_tokens)]
    depth.record("alone", "Each stage alone", rows)


def _results(processes: Sequence[Any], results: Any) -> Iterator[Alone]:
    """What each process found. Raises RuntimeError once one has failed."""
    missing = len(processes)
    while missing:
        try:
            yield results.get(timeout=1.0)
            missing -= 1
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RuntimeError("a stage failed, and said why above") from None


def measure(number: int, spec: StageSpec, batches: Sequence[MicroBatch], layers: tuple[int, ...], together: Barrier, results: Any) -> None:
    """One of the processes: load twice, warm up, and take all micro-batches."""
    if spec.device != "cpu":
        torch.zeros(1, device=spec.device)
    before_bytes = peak_rss_bytes(os.getpid())
    load_s, first_s, host_bytes = [], [], 0
    stage: Stage | None = None
    for _ in range(2):
        stage = None
        free()
        together.wait(START_S)
        stage, *seconds = _loading_s(spec)
        load_s.append(seconds[0])
        first_s.append(seconds[1])
        host_bytes = host_bytes or peak_rss_bytes(os.getpid()) - before_bytes
    assert stage is not None
    stage.begin(CaptureSpec({"residual": layers}, "bfloat16"))
    stage.warm_up(BATCH_TOKENS)
    together.wait(START_S)
    compute_s = _pass_s(stage, spec, batches)
    results.put(Alone(number, stage.bytes_read, tuple(load_s), tuple(first_s), host_bytes, compute_s))


def _loading_s(spec: StageSpec) -> tuple[Stage, float, float]:
    """The stage, its seconds to the last layer, and those until as many bytes were read as one layer has."""
    began = time.monotonic()
    first: list[float] = []

    def note(read_bytes: int, needed_bytes: int) -> None:
        if not first and read_bytes * len(spec.span) >= needed_bytes:
            first.append(time.monotonic() - began)

    stage = load_stage(spec, note)
    elapsed_s = time.monotonic() - began
    return stage, elapsed_s, first[0] if first else elapsed_s


def _pass_s(stage: Stage, spec: StageSpec, batches: Sequence[MicroBatch]) -> float:
    """Seconds of all micro-batches, two under way. Hidden states that come in are random, and lie on the device."""
    hidden_NH, under_way = None, deque[Any]()
    if not stage.is_first:
        width = stage.handed_bytes // DTYPES[spec.compute_dtype].itemsize
        most = max(batch.padded_tokens for batch in batches)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():  # as a stage receives them: layers are compiled for such tensors alone
            hidden_NH = torch.randn((most, width), generator=generator).to(spec.device, DTYPES[spec.compute_dtype])
    began = time.monotonic()
    for batch in batches:
        shape = batch.token_ids_BT.shape
        with torch.inference_mode():
            boundary = None if hidden_NH is None else Boundary(hidden_NH[: batch.padded_tokens].view(*shape, -1))
        under_way.append(stage.forward(batch, boundary))
        if len(under_way) > 2:
            _ = under_way.popleft().captured
    for output in under_way:
        _ = output.captured
    synchronize(spec.device)
    return time.monotonic() - began


def loading_rows(found: Sequence[Alone]) -> list[Row]:
    """The slowest stage decides; the first loading finds on the disk what lies there."""
    total_bytes = sum(each.read_bytes for each in found)
    rows = []
    for place, state in enumerate(("first, the page cache emptied", "again, from memory")):
        slowest_s = max(each.load_s[place] for each in found)
        each_s = ", ".join(f"{each.read_bytes / each.load_s[place] / 1e9:.1f}" for each in found)
        first_s = ", ".join(f"{each.first_s[place]:.1f}" for each in found)
        note = f"{total_bytes / 1e9:.0f} GB; GB/s by stage {each_s}; seconds until the first layer's bytes were read {first_s}"
        rows.append(Row(f"loading, {state}", total_bytes / 1e9 / slowest_s, "GB/s", note=note))
    host_bytes = max(each.host_bytes for each in found)
    return [*rows, Row("host memory that a stage's first loading takes, at most", host_bytes / 1e9, "GB")]


def efficiency_rows(depth: Depth, found: Sequence[Alone], num_tokens: int) -> list[Row]:
    """What `m2ray extract` made of the same micro-batches, as the part `extract` left it, against the slowest stage alone."""
    slowest_s = max(each.compute_s for each in found)
    alone = num_tokens / slowest_s
    note = f"seconds of each stage alone {', '.join(f'{each.compute_s:.1f}' for each in found)}"
    rows = [Row("the slowest stage alone", alone, "tokens/s", note=note)]
    path = depth.folder / "ran-few.json"
    if path.exists():
        report = json.loads(path.read_text())
        rate, steps = report["tokens_per_s"]["measured"], report["stages"][0]["micro_batches"]
        filling = (steps + depth.stages - 1) / steps
        rows.append(Row("the chain, filling and draining it included", rate, "tokens/s", alone, "the slowest stage alone", rate / alone))
        what = f"the chain, less the {depth.stages - 1} steps that fill it"
        rows.append(Row(what, rate * filling, "tokens/s", alone, "the slowest stage alone", rate * filling / alone, "0.95"))
    return rows


# -- transport ------------------------------------------------------------------------------------------------------------


def transport(depth: Depth, options: argparse.Namespace) -> None:
    """All layers, and few of them, where a micro-batch takes less time and its way counts more; the transports take turns."""
    vocab_size = json.loads((depth.model / "config.json").read_text())["vocab_size"]
    rows: list[Row] = []
    for layers in dict.fromkeys((depth.layers, options.depth)):
        chains = Chains(depth.model, vocab_size, layers, 0 if depth.tiny else depth.stages)
        rows += _of_transports(layers, _alternating(chains, depth.stages))
        depth.record("transport", "Hidden states from GPU to GPU and through the object store", rows)


def _alternating(chains: Chains, num_stages: int) -> dict[str, list[tuple[float, str, str]]]:
    """By transport what each round gave, of one chain that is loaded once."""
    rounds: dict[str, list[tuple[float, str, str]]] = {"object_store": [], "cuda_ipc": []}
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=16, num_gpus=chains.num_gpus, include_dashboard=False, _temp_dir=folder, logging_level="ERROR")
        try:
            with chains.stages(num_stages, "object_store") as stages:
                for number in range(2 * ROUNDS):
                    name: Transport = ("object_store", "cuda_ipc")[(number + number // 2) % 2]
                    _hand_on_by(stages, name)
                    rounds[name].append(chains.through(stages))
                    print(name, *rounds[name][-1], flush=True)
        finally:
            ray.shutdown()
    return rounds


def _hand_on_by(stages: Stages, transport: Transport) -> None:
    """Let a chain's actors agree on another transport when they are linked again."""
    actors = stages._actors.handles  # noqa: SLF001 - a run never changes its transport
    if not actors:
        stages.start()
    ray.get([actor.__ray_call__.remote(_set_transport, transport) for actor in stages._actors.handles])  # noqa: SLF001


def _set_transport(actor: Any, transport: Transport) -> None:
    actor._passage.outgoing._transport = transport  # noqa: SLF001 - as above


def _of_transports(layers: int, rounds: dict[str, list[tuple[float, str, str]]]) -> list[Row]:
    base = statistics.median(rate for rate, _, _ in rounds["object_store"])
    rows = []
    for name, found in rounds.items():
        rate = statistics.median(each[0] for each in found)
        note = f"rounds {', '.join(f'{each[0]:,.0f}' for each in found)}; share of each stage's time without computation {found[-1][1]}; sent by {found[-1][2]}"
        target = "1.02, or it goes" if name == "cuda_ipc" else ""
        rows.append(Row(f"{layers} layers, {name}", rate, "tokens/s", base, "object_store", rate / base, target, note))
    return rows
