"""An extraction called from Python: prompts in memory, stopped and gone on with, in a thread; and the notebook of examples/."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import m2ray
from examples import linear_probe
from tests.ray.conftest import REPOSITORY, RayCluster
from tests.reference import make_minimax


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("python") / "model", "bf16")


@pytest.mark.timeout(400)
def test_prompts_in_memory_are_stopped_and_gone_on_with_from_any_thread(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    called = cluster.run(sys.executable, "-m", "tests.ray.call_from_python", str(model), str(tmp_path), timeout_s=360)
    assert called.returncode == 0, called.stdout + called.stderr
    told = json.loads(called.stdout.splitlines()[-1])
    assert "not complete: 0 of" in told["stopped"]
    assert "Stopped by Ctrl-C. Committed shards are kept" in called.stdout
    assert told["stays"], "whoever joined Ray by themselves keep it"
    assert told["finished"].endswith("complete>")
    assert told["layers"] == [0, 2]
    assert len(told["same"]) == 40
    assert all(told["same"])
    assert told["again"] == told["finished"], "nothing was left to do"
    assert "fingerprints.prompts" in told["refused"]
    assert m2ray.open_run(tmp_path / "run").job.names == {"model": str(model), "prompts": "40 texts in memory"}


@pytest.mark.timeout(400)
def test_the_notebook_runs_from_top_to_bottom(
    cluster: RayCluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a person has it: the model's folder beside it. Random weights tell no labels; scripts/trained_model's do."""
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(model)
    words = [sys.executable, str(REPOSITORY / "tests/ray/run_notebook.py"), str(REPOSITORY / "examples/first_steps.ipynb")]
    env = {**cluster.env, "PYTHONPATH": str(REPOSITORY)}
    shown = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "<pre>It fits" in shown.stdout
    assert "64 sequences" in shown.stdout
    assert "complete</td>" in shown.stdout
    assert "The river is wonderful" in shown.stdout
    run = m2ray.open_run(tmp_path / "first-run")
    assert run.sequences["label"].to_pylist() == (["good"] * 4 + ["bad"] * 4) * 8
    assert tuple(ast.literal_eval(shown.stdout.splitlines()[-1])) == run.layer_numbers

    monkeypatch.setattr(
        sys, "argv", ["linear_probe.py", str(tmp_path / "first-run"), "--layers", "0", "--target", "label", "--pool", "mean"]
    )
    linear_probe.main()
    told = capsys.readouterr().out
    assert told.startswith("Which label, of the 2 commonest of 2?\nlayer 0: held-out accuracy")
    assert " of 13 rows;" in told, "one sequence in five is one row"
