"""The real job on one GPU: rows against transformers' own, plan against measured, and memory that others take away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import m2ray
from benchmarks.runs import environment, stage_processes
from tests.ray.test_extract import micro_batches
from tests.reference import MINIMAX_TINY, load_reference, make_minimax, reference_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS = range(MINIMAX_TINY["layers"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("gpu") / "model", "fp8")


def prompts(path: Path, count: int, longest: int) -> Path:
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("0123456789"), int(length))) for length in rng.integers(1, longest + 1, count)]
    path.write_text("\n".join(lines))
    return path


def command(model: Path, prompts: Path, run: Path, **options: object) -> list[str]:
    options = {"model": model, "prompts": prompts, "output": run, "compute_dtype": "float32", "store_dtype": "float32", **options}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "m2ray.cli", "extract", *words]


def assert_near_transformers(run: Path, model: Path, at_most: int) -> None:
    """The rows of the first micro-batches, by layer, within what float32 on a GPU may differ."""
    reference, reader = load_reference(model, torch.float32), m2ray.open_run(run)
    for micro_batch in micro_batches(run)[:at_most]:
        expected = reference_rows(reference, micro_batch)
        for layer in LAYERS:
            rows = torch.cat([reader.layer(layer).sequence(sequence_id) for sequence_id in micro_batch.sequence_ids.tolist()])
            assert ((rows - expected[layer]).norm(dim=1) / expected[layer].norm(dim=1)).max() < 1e-4, layer


@pytest.mark.parametrize("options", [{}, {"compile": False, "compression": "none"}])
def test_the_job_equals_transformers_and_reports_its_plan(folder: Path, tmp_path: Path, options: dict[str, object]) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        command(folder, prompts(tmp_path / "prompts.txt", 60, 200), run, stages=1, batch_tokens=1024, **options),
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_near_transformers(run, folder, at_most=20)
    report = json.loads((run / "report.json").read_text())
    (stage,) = report["stages"]
    assert report["parameter_bytes"]["planned"] == report["parameter_bytes"]["measured"]
    assert stage["gpus"][0]["peak_allocated_bytes"] < stage["gpus"][0]["planned_peak_bytes"]
    assert 0 < stage["compute_s"] < report["extract_s"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("transport", ["cuda_ipc", "object_store"])
def test_two_stages_give_the_rows_of_one_by_either_transport(folder: Path, tmp_path: Path, transport: str) -> None:
    source = prompts(tmp_path / "prompts.txt", 60, 200)
    rows = []
    for name, options in {"one": {"stages": 1}, "two": {"stages": 2, "transport": transport}}.items():
        words = command(folder, source, tmp_path / name, batch_tokens=1024, compile=False, **options)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=140, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(m2ray.open_run(tmp_path / name).tensor())
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [stage["sends_by"] for stage in report["stages"]] == [transport, ""]
    assert torch.equal(*rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_rows_are_the_same_when_stages_are_killed_that_share_gpu_memory(folder: Path, tmp_path: Path) -> None:
    """Whoever maps the memory of a killed stage, or whose memory a killed stage has mapped, goes on with the one that comes in its place."""
    rng = np.random.default_rng(0)
    source = prompts(tmp_path / "prompts.txt", 5_000, 200)
    options = {"stages": 2, "transport": "cuda_ipc", "batch_tokens": 4096, "shard_tokens": 20_000, "compile": False, "layers": "2,6"}
    rows, killed = [], 0
    for name, kills in {"undisturbed": 0, "killed": 4}.items():
        run, log = tmp_path / name, tmp_path / f"{name}.log"
        with log.open("wb") as output:
            job = subprocess.Popen(command(folder, source, run, **options), env=environment(), stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        for number in range(kills):
            while job.poll() is None and time.monotonic() < deadline and len(list(run.glob("_commits/shard-*.json"))) < 3 * number + 1:
                os.sched_yield()
            for pid in rng.permutation(list(stage_processes(job.pid)))[:1].tolist():
                os.kill(pid, signal.SIGKILL)
                killed += 1
        assert job.wait(150) == 0, log.read_text()
        rows.append(m2ray.open_run(run).tensor())
    assert killed == 4
    assert torch.equal(*rows)


def test_a_micro_batch_that_finds_no_room_on_the_gpu_is_halved(folder: Path, tmp_path: Path) -> None:
    """Another process takes nearly all memory once the stage's process is there, so that the plan was right and is so no more."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(
        folder, prompts(tmp_path / "prompts.txt", 2200, 1000), run, stages=1, batch_tokens=1_000_000, shard_tokens=1_100_000, compile=False
    )
    with log.open("wb") as output:
        job = subprocess.Popen(words, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(stage_processes(job.pid)) and time.monotonic() < deadline and job.poll() is None:
        os.sched_yield()
    free_bytes, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free_bytes - (3 << 30), dtype=torch.uint8, device="cuda")
    assert job.wait(200) == 0, log.read_text()
    del taken
    torch.cuda.empty_cache()
    printed = log.read_text()
    assert "found no room in the layers 0-" in printed
    assert "CUDA out of memory" in printed
    shapes = [shape for path in (run / "_commits").iterdir() for shape in json.loads(path.read_text())["micro_batches"]]
    assert max(count * length for count, length in shapes) <= 500_000
    assert np.unique(m2ray.open_run(run).tokens()["sequence_id"]).size == 2200
