"""MiniMax-M3, a multimodal model, through the user's own commands: its text tower's rows, and prompts with tokens that stand for images."""

import json
from pathlib import Path

import pytest

from tests.ray.conftest import RayCluster
from tests.ray.test_extract import assert_equals_transformers, words
from tests.reference import M3_TINY, make_m3


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_m3(tmp_path_factory.mktemp("m3") / "model")


def test_minimax_m3_over_three_stages_equals_transformers(cluster: RayCluster, m3: Path, tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    texts = ["the sea and the wind " * (1 + number % 9) for number in range(24)]
    texts[5] = "what is this? <|image|>"
    prompts.write_text("".join(json.dumps({"id": f"row-{number}", "text": text}) + "\n" for number, text in enumerate(texts)))
    extracted = cluster.run("m2ray", "extract", *words(m3, prompts, run, "--stages", "3"))
    assert extracted.returncode == 0, extracted.stdout + extracted.stderr
    assert_equals_transformers(run, m3, range(M3_TINY["layers"]))
    facts = json.loads(cluster.run("m2ray", "inspect", str(run), "--json").stdout)
    assert facts["complete"]
    [quarantined] = facts["quarantined"]
    assert quarantined["row_id"] == "row-5"
    assert "'<|image|>', token 6, config.json's image_token_index" in quarantined["reason"]
    assert facts["model"]["model_type"] == "minimax_m3_vl"
