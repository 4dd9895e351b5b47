"""Waves on a GPU: the bits of micro-batches one at a time, their memory, and the real job, left alone and struck."""

import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import m2ray
from benchmarks.runs import environment
from m2ray.batches import LayerSpan, MicroBatch, Residency
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.stage_output import StageOutput
from tests.gpu.test_extract_on_gpu import command, prompts
from tests.ray.conftest import RayCluster
from tests.ray.struck_waves import (
    TIMEOUT_S,
    in_waves_of_two,
    said,
    stage_on,
    stopped_within_a_wave,
    submit,
    two_node_cluster,
    undisturbed,
)
from tests.ray.test_extract import wait_for_commits
from tests.ray.test_faults import assert_same_run
from tests.reference import MINIMAX_TINY, make_minimax, micro_batch_of

if TYPE_CHECKING:
    from m2ray.model.boundary import Boundary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NUM_LAYERS = MINIMAX_TINY["layers"]
CAPTURE = CaptureSpec({"residual": tuple(range(NUM_LAYERS)), "router_topk": (1, 5), "embedding": ()}, "bfloat16")
WHERE: Mapping[str, Mapping[int, Residency]] = {
    "packed": dict.fromkeys(range(NUM_LAYERS), "gpu_packed"),
    "mixed": {1: "host", 3: "gpu_packed", 4: "checkpoint", 6: "host"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("gpu") / "model", "fp8")


def batches() -> list[MicroBatch]:
    return [replace(micro_batch_of((9 + seed, 230, 1, 170, 4), 96, seed), index=seed) for seed in range(8)]


def values(outputs: list[StageOutput]) -> dict[tuple[object, ...], bytes]:
    return {
        (output.micro_batch.index, each.site, each.layer, number): column.tobytes()
        for output in outputs
        for each in output.captured
        for number, column in enumerate(each.columns)
    }


def in_a_wave(stages: list[Stage]) -> list[StageOutput]:
    """As the chain does: what is captured is waited for two outputs behind."""
    found: list[StageOutput] = []
    entering: deque[tuple[MicroBatch, Boundary | None]] = deque((micro_batch, None) for micro_batch in batches())
    for stage in stages:
        leaving: deque[tuple[MicroBatch, Boundary | None]] = deque()
        for output in stage.forward_wave(entering):
            found.append(output)
            if len(found) > 2:
                _ = found[-3].captured
            if output.leaves:
                leaving.append((output.micro_batch, output.boundary))
        entering = leaving
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_a_wave_gives_what_micro_batches_give_one_at_a_time(folder: Path, where: str, *, compiled: bool) -> None:
    spec = StageSpec(str(folder), LayerSpan(0, 3), "bfloat16", "auto", "cuda:0", None, residency=WHERE[where], compile=compiled)
    stages = [load_stage(each, lambda *_: None) for each in (spec, replace(spec, span=LayerSpan(3, NUM_LAYERS)))]
    for stage in stages:
        stage.begin(CAPTURE)
        stage.warm_up(2048)
    expected = []
    for micro_batch in batches():
        boundary: Boundary | None = None
        for stage in stages:
            expected.append(stage.forward(micro_batch, boundary))
            boundary = expected[-1].boundary
    wanted = values(expected)
    assert len(wanted) == 8 * (NUM_LAYERS + 2 * 2 + 1)
    for _ in range(2):
        assert values(in_a_wave(stages)) == wanted


def test_a_wave_holds_its_hidden_states_once(folder: Path) -> None:
    """And nothing of a layer that it has left."""
    spec = StageSpec(str(folder), LayerSpan(0, NUM_LAYERS), "bfloat16", "auto", "cuda:0", None, residency=WHERE["packed"])
    stage = load_stage(spec, lambda *_: None)
    stage.begin(CAPTURE)
    stage.warm_up(2048)
    peaks = []
    for count in (2, 14):
        lengths = (256,) * 4
        entering: deque[tuple[MicroBatch, Boundary | None]] = deque((micro_batch_of(lengths, 96, seed), None) for seed in range(count))
        torch.cuda.reset_peak_memory_stats()
        for output in stage.forward_wave(entering):
            _ = output.captured
        peaks.append(torch.cuda.max_memory_allocated())
    hidden_bytes = 1024 * MINIMAX_TINY["hidden_size"] * 2
    assert peaks[1] - peaks[0] <= 14 * hidden_bytes


@pytest.mark.parametrize("stages", [1, 2])
def test_a_job_in_waves_gives_the_rows_of_layers_that_are_ready(folder: Path, tmp_path: Path, stages: int) -> None:
    if torch.cuda.device_count() < stages:
        pytest.skip(f"needs {stages} CUDA devices")
    source, rows = prompts(tmp_path / "prompts.txt", 600, 200), []
    ways: dict[str, dict[str, object]] = {"ready": {"stages": 1}, "waves": {"stages": stages, "weights": "packed"}}
    for name, options in ways.items():
        words = command(folder, source, tmp_path / name, batch_tokens=1024, shard_tokens=3000, compile=False, **options)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(m2ray.open_run(tmp_path / name).tensor())
    assert "waves of" in done.stdout + done.stderr
    assert torch.equal(*rows)
    assert np.unique(m2ray.open_run(tmp_path / "waves").tokens()["sequence_id"]).size == 600


def test_a_job_of_a_packed_and_a_streamed_stage_on_parts_of_one_gpu_stopped_within_a_wave(folder: Path, tmp_path: Path) -> None:
    """By `ray job submit`, and submitted again: while the first is at work, whose end it waits for, since it imports torch for half a minute."""
    batch_tokens, run = 256, tmp_path / "run"
    options = f"--compute-dtype float32 --store-dtype float32 --batch-tokens {batch_tokens} --shard-tokens 500 --compile false"
    words = ["--model", str(folder), "--prompts", str(prompts(tmp_path / "prompts.txt", 80, 200)), *options.split()]
    in_waves = [*words, *in_waves_of_two(batch_tokens)]
    with undisturbed(words, tmp_path / "undisturbed"):
        of_first, of_second = bytes_of_parts(in_waves)
        with two_node_cluster(num_gpus=1) as cluster:
            first, second = nodes_in_order(cluster)
            limits = f"{first}={of_first};{second}={of_second}"
            job = ["python", "jobs/extract.py", *in_waves, "--offload", "cpu", "--max-memory", limits, "--output", str(run), "--wait"]
            submitted = cluster.start(*submit(cluster, "first"), *job)
            process = stage_on(cluster, second, submitted)
            again = cluster.start(*submit(cluster, "again"), *job)
            wait_for_commits(run, 1, submitted)
            printed = stopped_within_a_wave(cluster, submitted, process, run)
            printed_again, _ = again.communicate(timeout=TIMEOUT_S)
            said("the job that was submitted again has ended")
    assert (run / "_SUCCESS").exists(), printed_again
    assert_same_run(run, tmp_path / "undisturbed")
    assert re.search(r"layers 0-2, .* of weights, layers 0-2 packed, waves of 512 tokens", printed)
    assert re.search(r"layers 3-6, .* of weights, .*layers 4-6 in host memory, waves of 512 tokens", printed)


def bytes_of_parts(words: Sequence[str]) -> tuple[int, int]:
    """Of the GPU, by which the first stage has room for its layers, packed, and the second lacks a byte, though not to take them in turn.

    A wave's hidden states take less than a layer, for which the first would else have room without one.
    """
    plan = [sys.executable, "-m", "m2ray.cli", "plan", "--json", "--gpus", "2 nodes of 1xH200", *words]
    done = subprocess.run(plan, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    first, second = json.loads(done.stdout)["gpus"]
    return first["peak_bytes"], second["peak_bytes"] - second["running"]["wave"] - 1


def nodes_in_order(cluster: RayCluster) -> list[str]:
    """The nodes' addresses, as stages are given to them."""
    program = "import ray; ray.init(log_to_driver=False); print(*(node['NodeManagerAddress'] for node in ray.nodes()))"
    done = cluster.run(sys.executable, "-c", program, timeout_s=60)
    said(f"the nodes are {done.stdout.strip()}")
    return done.stdout.split()
