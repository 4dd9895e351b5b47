"""A stage of several GPUs: the second has the rows of the first, though the first is the thread's own all the while."""

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import m2ray
from benchmarks.runs import environment
from m2ray.batches import LayerSpan, Residency
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec, load_stage
from tests.gpu.test_extract_on_gpu import command, prompts
from tests.reference import MINIMAX_TINY, make_minimax, micro_batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
NUM_LAYERS = MINIMAX_TINY["layers"]
WHERE: Mapping[int, Residency] = {1: "gpu_packed", 2: "host", 4: "checkpoint", 5: "host"}
LAYERS = tuple(range(NUM_LAYERS))
CAPTURE = CaptureSpec(
    {"residual": LAYERS, "router_logits": (1,)}, "bfloat16", statistics={"moments": {"residual": LAYERS}, "norms": {"residual": (3,)}}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("gpu") / "model", "fp8")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_span_on_it_gives_the_same_rows_and_statistics(folder: Path, *, compiled: bool) -> None:
    spec = StageSpec(str(folder), LayerSpan(0, NUM_LAYERS), "bfloat16", "auto", "cuda:0", None, residency=WHERE, compile=compiled)
    batches = [micro_batch_of((9 + seed, 230, 1, 170, 4), 96, seed) for seed in range(6)]
    found = []
    for device in ("cuda:0", "cuda:1"):
        stage = load_stage(replace(spec, device=device), lambda *_: None)
        stage.begin(CAPTURE)
        stage.warm_up(2048)
        outputs = [stage.forward(batch, None) for batch in batches]
        captured = [each for output in outputs for each in output.captured]
        rows = [column.tobytes() for each in captured for column in each.columns]
        found.append(rows + [values.tobytes() for each in captured for values in each.statistics.values()])
        assert torch.cuda.current_device() == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("weights", ["bf16", "packed"])
def test_a_job_on_two_gpus_a_stage_gives_the_rows_of_one(folder: Path, tmp_path: Path, weights: str) -> None:
    source, rows = prompts(tmp_path / "prompts.txt", 300, 200), []
    for gpus_per_stage in (1, 2):
        run = tmp_path / str(gpus_per_stage)
        options = {"stages": 1, "gpus_per_stage": gpus_per_stage, "weights": weights, "batch_tokens": 1024, "compile": False}
        done = subprocess.run(
            command(folder, source, run, **options), env=environment(), capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(m2ray.open_run(run).tensor())
    assert torch.equal(*rows)
