"""Examples that read several sites, as a user runs them, on a small run with rows of known numbers."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import expert_load, train_transcoder
from m2ray.batches import Bits, Column, PartSpec
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

WIDTH = 16
LAYERS = (3, 4)
PARTS = (
    PartSpec.of("mlp_in", 3, "float32", WIDTH),
    PartSpec.of("mlp", 3, "float32", WIDTH),
    *(PartSpec("router_topk", layer, (Column("expert_ids", "int16", 2), Column("expert_weights", "float32", 2))) for layer in LAYERS),
)
MLP = np.random.default_rng(5).standard_normal((2, WIDTH, WIDTH), dtype=np.float32)


def experts_of(layer: int, sequence_id: int) -> np.ndarray:
    """At layer 3 always experts 0 and 5; at layer 4 each of 6 as often as the others, all but evenly."""
    positions = np.arange(runs.token_count(sequence_id))
    pair = (np.zeros_like(positions), np.full_like(positions, 5)) if layer == 3 else (positions % 6, (positions + 3) % 6)
    return np.stack(pair, axis=1).astype(np.int16)


def bits(part: PartSpec, sequence_id: int) -> Bits:
    if part.site == "router_topk":
        assert part.layer is not None
        ids = experts_of(part.layer, sequence_id)
        return np.concatenate([ids.view(np.uint8), np.full(ids.shape, 0.5, np.float32).view(np.uint8)], axis=1)
    entering = np.random.default_rng(sequence_id).standard_normal((runs.token_count(sequence_id), WIDTH), dtype=np.float32)
    return (entering if part.site == "mlp_in" else np.maximum(entering @ MLP[0], 0) @ MLP[1]).view(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "bits", bits)
        runs.finished_run(LocalStore(folder), PARTS)
    return folder


def test_the_load_of_experts_is_drawn_by_layer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expert_load.py", str(run), "--svg", str(tmp_path / "load.svg")])
    expert_load.main()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"67 tokens in {run}; 6 experts"
    assert told[1] == "layer   3 |█    █| expert 0 has 3.0 times an even load; 4 never chosen; as good as 2.0 used evenly"
    assert re.fullmatch(
        r"layer   4 \|[▒▓]{6}\| expert \d has 1\.\d times an even load; 0 never chosen; as good as 6\.0 used evenly", told[2]
    )
    assert (tmp_path / "load.svg").read_text().count("<rect") == 12


def test_a_transcoder_learns_what_an_mlp_does(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Few rows: held out are those of sequences 0 and 10."""
    words = ["--layer", "3", "--features", "64", "--active", "16", "--steps", "150", "--batch-rows", "16"]
    monkeypatch.setattr(sys, "argv", ["train_transcoder.py", str(run), *words])
    train_transcoder.main()
    told = capsys.readouterr().out
    assert f"{runs.token_count(0) + runs.token_count(10)} held-out rows" in told
    explained = float(re.search(r"explained variance of the MLP: (-?[\d.]+)", told)[1])
    assert 0.2 < explained < 1, told
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert losses[-1] < losses[0] / 2
