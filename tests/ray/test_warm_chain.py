"""A chain that stays: jobs and requests without loading, whoever dies beside it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import m2ray
from tests.ray.conftest import RayCluster, free_ports
from tests.ray.test_extract import assert_equals_transformers, minimax, prompts  # noqa: F401 - fixtures
from tests.reference import MINIMAX_TINY, same_bits

SCRIPT = str(Path(__file__).with_name("warm_chain.py"))
TOKEN = "0123456789abcdef"
DTYPES = ("--compute-dtype", "float32", "--store-dtype", "float32", "--threads-per-stage", "1")


@pytest.mark.timeout(240)
def test_jobs_and_requests_share_a_loaded_chain(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    """One stage's layers are ready, the other's in the files. Its driver is gone, another one is killed at work, and stages are killed: what comes after finds the chain, and the right rows."""
    words = ["--model", str(minimax), "--name", "tiny", "--stages", "2", "--batch-tokens", "256", "--shard-tokens", "400", *DTYPES]
    words += ["--http-port", str(free_ports(1)[0])]
    seen: dict[str, Any] = {}
    try:
        env = {"M2RAY_SERVE_TOKEN": TOKEN, "PYTHONPATH": str(Path(SCRIPT).parents[2])}  # it uses the tests' own modules
        done = cluster.run(sys.executable, SCRIPT, "tiny", str(prompts), str(tmp_path), *words, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = json.loads(done.stdout.splitlines()[-1])
    finally:
        if not seen:
            cluster.run("m2ray", "serve", "--stop", "tiny")

    assert_equals_transformers(tmp_path / "first", minimax, range(MINIMAX_TINY["layers"]))
    assert_equals_transformers(tmp_path / "second", minimax, (0, 3))
    assert m2ray.open_run(tmp_path / "second").site("mlp").layer_numbers == (2,)
    assert seen["before"] == seen["after"], "the same processes, also after a driver was killed"
    assert seen["read_bytes"][0] == seen["read_bytes"][1], "the weights were read once"
    assert "compute_dtype" in seen["refused"][0]
    assert "threads_per_stage" in seen["refused"][0]
    assert "the chain tiny holds" in seen["refused"][1]

    answers = [load_file(tmp_path / f"{when}.safetensors") for when in ("idle", "beside", "mended", "http")]
    assert seen["http"] == seen["after_http"] == [200, 401]
    assert seen["beside"] == 3
    for answer in answers[1:]:
        assert all(same_bits(answer[column], values) for column, values in answers[0].items())
    assert_rows_of_a_run(tmp_path / "asked", answers[0])
    assert not set(seen["mended"]) & set(seen["after"]), "the killed stages came back, one for a job and one for a request"
    assert "has other weights than the chain tiny has loaded from there" in seen["replaced"][0]
    for said in seen["replaced"][1:]:
        assert "not those that the other stages have loaded: they were replaced meanwhile (the embedding and layers 0" in said
    assert seen["status"] == [True, 4, 8, "", ""], (
        "loaded, four jobs with the killed one, the answers and refusals, nothing at work, no trouble"
    )
    assert "tiny" in seen["listed"]
    assert "idle" in seen["listed"]
    assert "The chain ghost was gone, its keeper killed" in seen["listed"]
    assert "The chain tiny has ended." in seen["stopped"][0]
    assert "it was stopped" in seen["stopped"][1], "whether the keeper says so or is gone already"
    assert "What a job has finished is kept" in seen["stopped"][1]
    assert "There are no chains" in seen["none"]
    assert_goes_on_without_the_chain(tmp_path / "first", minimax, prompts)


def assert_goes_on_without_the_chain(run: Path, model: Path, prompts: Path) -> None:  # noqa: F811
    """A stage of its own has not loaded the final norm, which the chain has."""
    (run / "_SUCCESS").unlink()
    min((run / "_commits").iterdir()).unlink()
    options: Any = {"compute_dtype": "float32", "store_dtype": "float32", "id_column": "id", "shard_tokens": 400}
    m2ray.extract(model=model, prompts=prompts, output=run, **options)
    assert (run / "_SUCCESS").exists()


def assert_rows_of_a_run(run: Path, answer: dict[str, torch.Tensor]) -> None:
    """What a request gives is what a run of the same prompts writes, bit by bit."""
    reader = m2ray.open_run(run)
    for number in range(9):
        chosen = answer["sequence"] == number
        for layer in range(MINIMAX_TINY["layers"]):
            assert same_bits(answer[f"residual.{layer}"][chosen], reader.site("residual").layer(layer).sequence(number)), (number, layer)
        assert same_bits(answer["mlp.2"][chosen], reader.site("mlp").layer(2).sequence(number)), number
    assert answer["sequence"].unique().tolist() == list(range(9))
