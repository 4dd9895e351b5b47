"""What people take of chats, in one job: some tokens of a few layers, the router everywhere, a covariance; killed twice, and the same all the same."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

import m2ray
from m2ray.activations.reading.verify import verify
from m2ray.storage import LocalStore
from tests.following import assert_every_row_once, follow
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import commits, minimax, summed, wait_for_commits  # noqa: F401 - a fixture among them
from tests.ray.test_faults import stage_processes
from tests.reference import MINIMAX_TINY, same_bits
from tests.summed import close_covariance

LAYERS = (0, 1, 3, 4, 6)
WANTED = (
    *("--sites", "residual:0-1,3-4,6, router_topk:all", "--mask", "assistant", "--tokens", "mask:last:16"),
    *("--statistics", "experts, covariance:1,4", "--store-dtype", "bfloat16", "--compute-dtype", "bfloat16"),
    *("--batch-tokens", "256", "--shard-tokens", "500", "--threads-per-stage", "1"),
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One to three turns each; some have no answer, and so no row."""
    path, rng, lines = tmp_path_factory.mktemp("chats") / "chats.jsonl", np.random.default_rng(0), []
    for number in range(36):
        words = [" ".join(rng.choice(["sea", "wind", "stone", "水", "light"], int(count))) for count in rng.integers(1, 12, 6)]
        turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(words)]
        lines.append({"messages": turns[: 1 + number % 6]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.timeout(600)
def test_a_run_of_chosen_tokens_is_the_same_whatever_is_killed(
    cluster: RayCluster,
    minimax: Path,  # noqa: F811
    chats: Path,
    tmp_path: Path,
) -> None:
    def words(run: Path, *more: str) -> list[str]:
        return ["m2ray", "extract", "--model", str(minimax), "--prompts", str(chats), "--output", str(run), *WANTED, *more]

    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    done = cluster.run(*words(undisturbed, "--stages", "1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sequences have no chosen token, and so no row" in done.stdout
    driver = cluster.start(*words(run, "--stages", "2", "--in-flight", "1KB"))
    wait_for_commits(run, 1, driver)
    driver.kill()
    driver.wait(30)
    before, followed = commits(run), follow(str(run), 3)
    assert not (run / "_SUCCESS").exists()
    driver = cluster.start(*words(run, "--stages", "3", "--in-flight", "1KB"))
    wait_for_commits(run, 3, driver)
    os.kill(max(stage_processes(cluster)), signal.SIGKILL)
    printed, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, printed
    assert "The driver that was at this run ended without a word" in printed, "its lease is outlived at once"
    assert "died: restarted" in printed
    after = commits(run)
    assert int(re.search(r"(\d+) of \d+ shards are missing", printed)[1]) == len(after) - len(before) < len(after)
    assert {name: after[name] for name in before} == before
    ours, theirs = m2ray.open_run(run), m2ray.open_run(undisturbed)
    assert np.array_equal(ours.site("residual").tokens(), theirs.site("residual").tokens())
    assert same_bits(ours.site("residual").tensor(), theirs.site("residual").tensor())
    routed, expected = ours.site("router_topk").tensor(), theirs.site("router_topk").tensor()
    assert all(same_bits(routed[name], expected[name]) for name in ("expert_ids", "expert_weights"))
    assert summed(run) == summed(undisturbed) != {}
    assert ours.site("residual").layer_numbers == LAYERS
    assert_they_are_of_the_stored_rows(run)
    assert_every_row_once(followed.result(60), str(run), 3)
    report = json.loads((run / "report.json").read_text())
    assert report["rows"]["measured"] > 0
    assert 0 < report["rows"]["planned"] < report["tokens"]
    assert report["saved_bytes"]["measured"] > 0
    assert not verify(LocalStore(run), threads=1, checksums=True).damages


def assert_they_are_of_the_stored_rows(run: Path) -> None:
    """The rows are the last 16 of what assistants say, and statistics count each of them once."""
    reader = m2ray.open_run(run)
    sequences, tokens = reader.sequences, reader.site("residual").tokens()
    for sequence_id, mask in zip(sequences["sequence_id"].to_pylist(), sequences["loss_mask"].to_pylist(), strict=True):
        assert tokens["position"][tokens["sequence_id"] == sequence_id].tolist() == np.flatnonzero(mask)[-16:].tolist()
    for layer in (1, 4):
        found = reader.statistics("residual", layer)
        close_covariance(found.covariance.numpy(), reader.site("residual").layer(layer).tensor().double().numpy())
    for layer in range(MINIMAX_TINY["layers"]):
        ids = reader.site("router_topk").layer(layer).tensor()["expert_ids"].numpy()
        load = reader.statistics("router_topk", layer).expert_load
        assert load.tolist() == np.bincount(ids.reshape(-1), minlength=MINIMAX_TINY["num_experts"]).tolist()
