"""A chain that stays: jobs and requests without loading, whoever dies beside it."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import m2ray
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import assert_equals_transformers, minimax, prompts  # noqa: F401 - fixtures
from tests.reference import MINIMAX_TINY, same_bits

SCRIPT = str(Path(__file__).with_name("warm_chain.py"))
DTYPES = ("--compute-dtype", "float32", "--store-dtype", "float32")


@pytest.fixture
def name(cluster: RayCluster, minimax: Path) -> Iterator[str]:  # noqa: F811
    """A chain of two stages, whose driver is gone."""
    words = ("--name", "tiny", "--stages", "2", "--batch-tokens", "256", "--shard-tokens", "400", *DTYPES)
    served = cluster.run("m2ray", "serve", "--model", str(minimax), *words)
    assert served.returncode == 0, served.stdout + served.stderr
    yield "tiny"
    stopped = cluster.run("m2ray", "serve", "--stop", "tiny")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


def killed_at_work(cluster: RayCluster, name: str, model: Path, prompts: Path, output: Path) -> None:  # noqa: F811
    """A job on the chain, whose driver is killed once a shard is committed."""
    words = ("--chain", name, "--model", str(model), "--prompts", str(prompts), "--output", str(output), "--id-column", "id", *DTYPES)
    driver = cluster.start("m2ray", "extract", *words, "--shard-tokens", "40", "--batch-tokens", "40")
    deadline = time.monotonic() + 60
    try:
        while not list((output / "_commits").glob("*")):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=30)


@pytest.mark.timeout(180)
def test_jobs_and_requests_share_a_loaded_chain(
    cluster: RayCluster,
    name: str,
    minimax: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    killed_at_work(cluster, name, minimax, prompts, tmp_path / "killed")
    done = cluster.run(sys.executable, SCRIPT, name, str(prompts), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    assert_equals_transformers(tmp_path / "first", minimax, range(MINIMAX_TINY["layers"]))
    assert_equals_transformers(tmp_path / "second", minimax, (0, 3))
    assert m2ray.open_run(tmp_path / "second").site("mlp").layer_numbers == (2,)
    assert seen["before"] == seen["after"], "the same processes, also after a driver was killed"
    assert seen["read_bytes"][0] == seen["read_bytes"][1], "the weights were read once"
    assert seen["first_commit_s"] < 2.0
    assert "compute_dtype" in seen["refused"][0]
    assert "threads_per_stage" in seen["refused"][0]
    assert "the chain tiny holds" in seen["refused"][1]

    answers = [load_file(tmp_path / f"{when}.safetensors") for when in ("idle", "beside", "mended")]
    assert seen["beside"] == 3
    for answer in answers[1:]:
        assert all(same_bits(answer[column], values) for column, values in answers[0].items())
    assert_rows_of_a_run(cluster, name, minimax, prompts, tmp_path, answers[0])
    assert seen["mended"][0] != seen["after"][0], "the killed stage came back"
    assert seen["mended"][1:] == seen["after"][1:]
    assert seen["status"][0] is True
    assert seen["status"][3:] == ["", ""]

    listed = cluster.run("m2ray", "chains")
    assert "idle" in listed.stdout, listed.stdout + listed.stderr
    assert "tiny" in listed.stdout


def assert_rows_of_a_run(
    cluster: RayCluster,
    name: str,
    model: Path,
    prompts: Path,  # noqa: F811
    folder: Path,
    answer: dict[str, torch.Tensor],
) -> None:
    """What a request gives is what a run of the same prompts writes, bit by bit."""
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if json.loads(line)["text"]][:9]
    (folder / "asked.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = ("--model", str(model), "--prompts", str(folder / "asked.jsonl"), "--output", str(folder / "asked"), "--id-column", "id")
    ran = cluster.run(
        *("m2ray", "extract", "--chain", name, *words, *DTYPES),
        *("--shard-tokens", "400", "--sites", "residual:all, mlp:2"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run = m2ray.open_run(folder / "asked")
    for number in range(len(lines)):
        chosen = answer["sequence"] == number
        for layer in range(MINIMAX_TINY["layers"]):
            assert same_bits(answer[f"residual.{layer}"][chosen], run.site("residual").layer(layer).sequence(number)), (number, layer)
        assert same_bits(answer["mlp.2"][chosen], run.site("mlp").layer(2).sequence(number)), number
    assert np.unique(answer["sequence"]).tolist() == list(range(len(lines)))
