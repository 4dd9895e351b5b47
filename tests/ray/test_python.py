"""The notebook of examples/, called from Python: prompts in memory, stopped and gone on with, in a thread; and the probe on its run."""

import json
import sys
from pathlib import Path

import pytest

import m2ray
from examples import linear_probe
from tests.ray.conftest import REPOSITORY, RayCluster
from tests.reference import make_minimax


@pytest.mark.timeout(400)
def test_the_notebook_is_stopped_and_gone_on_with_from_any_thread(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a person has it: the model's folder beside it. Random weights tell no labels; scripts/trained_model's do."""
    model = make_minimax(tmp_path / "SmolLM2-135M-Instruct", "bf16")
    words = [sys.executable, str(REPOSITORY / "tests/ray/call_from_python.py"), str(REPOSITORY / "examples/first_steps.ipynb")]
    called = cluster.run(*words, timeout_s=360, cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert called.returncode == 0, called.stdout + called.stderr
    told = json.loads(called.stdout.splitlines()[-1])
    assert "not complete: 0 of" in told["stopped"]
    assert "Stopped by Ctrl-C. Committed shards are kept" in called.stdout
    assert told["stays"], "whoever joined Ray by themselves keep it"
    assert "Going on with the run of" in called.stdout
    assert told["finished"].endswith("complete>")
    assert len(told["same"]) == 64
    assert all(told["same"])
    assert told["again"] == told["finished"], "nothing was left to do"
    assert "fingerprints.prompts" in told["refused"]
    for shown in ("<pre>It fits", "64 sequences", "complete</td>", "The river is wonderful"):
        assert shown in called.stdout

    run = m2ray.open_run(tmp_path / "first-run")
    assert run.job.names == {"model": str(model), "prompts": "64 rows in memory"}
    assert run.sequences["label"].to_pylist() == (["good"] * 4 + ["bad"] * 4) * 8
    assert tuple(map(int, told["accuracies"])) == run.layer_numbers

    monkeypatch.setattr(
        sys, "argv", ["linear_probe.py", str(tmp_path / "first-run"), "--layers", "0", "--target", "label", "--pool", "mean"]
    )
    capsys.readouterr()
    linear_probe.main()
    said = capsys.readouterr().out
    assert said.startswith("Which label, of the 2 commonest of 2?\nlayer 0: held-out accuracy")
    assert " of 13 rows;" in said, "one sequence in five is one row"
