"""A trained model through the user's own command: random weights have neither next words worth predicting nor massive activations."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import m2ray
from tests.ray.conftest import REPOSITORY, RayCluster, environment
from tests.ray.test_extract import micro_batches
from tests.reference import load_reference, reference_rows, same_bits

NUM_LAYERS = 30
MASSIVE_LAYER, MASSIVE_DIMENSION = 20, 507
"""Where the first token of any prompt has a norm of some 25,000, nearly all of it in one dimension; other tokens have 260."""

ENGLISH = (
    "The capital of France is",
    "The opposite of hot is",
    "Water freezes at zero degrees",
    "One, two, three, four, five, six,",
    "The quick brown fox jumps over the lazy",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who had never seen a storm like this one. He",
    "The Earth goes around the Sun, and around the Earth goes the",
    "Monday, Tuesday, Wednesday,",
)
CHINESE = (
    "中国的首都是",
    "今天天气很好，我们去公园",
    "一二三四五六七八九",
    "你好，请问你叫什么",
    "水在零摄氏度时会",
    "床前明月光，疑是地上霜。举头望明月，低头思",
    "春天来了，花园里的花都",
    "这本书是关于",
)
CODE = (
    "import numpy as",
    "def add(a, b):\n    return a +",
    "for i in range(10):\n    print(",
    "int main(void) {\n    return",
    "SELECT name FROM users WHERE id",
    "<html>\n<head>\n<title>Hello</title>\n</head>\n<body>\n<p>Hi</p>\n</body>\n</",
    "class Node:\n    def __init__(self, value):\n        self.value =",
    "for (int i = 0; i < n; i",
)
PROMPTS = (*ENGLISH, *CHINESE, *CODE)
KNOWN = {
    "The capital of France is": " Paris",
    "The quick brown fox jumps over the lazy": " dog",
    "Water freezes at zero degrees": " Celsius",
    "import numpy as": " np",
    "def add(a, b):\n    return a +": " b",
    "for (int i = 0; i < n; i": "++",
}
"""What any trained model says next."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as scripts/trained_model makes it. Skips in one line where PyPI has it not, or fails where M2RAY_REQUIRE_TRAINED is 1."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    made = subprocess.run(
        [REPOSITORY / "scripts/trained_model", folder], env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    if "pip cannot get" in made.stderr:
        message = f"no trained model: {made.stderr.strip().splitlines()[-1]}"
        if os.environ.get("M2RAY_REQUIRE_TRAINED") == "1":
            pytest.fail(f"{message} (M2RAY_REQUIRE_TRAINED=1)", pytrace=False)
        pytest.skip(message)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.timeout(720)
def test_a_trained_model_is_extracted_as_transformers_computes_it(cluster: RayCluster, model: Path, tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in PROMPTS), encoding="utf-8")
    options = (
        *("--stages", "3", "--threads-per-stage", "1", "--compute-dtype", "float32", "--store-dtype", "float32"),
        *("--batch-tokens", "256", "--shard-tokens", "300"),
    )
    done = cluster.run(
        "m2ray", "extract", "--model", str(model), "--prompts", str(prompts), "--output", str(run), *options, timeout_s=400.0
    )
    assert done.returncode == 0, done.stdout + done.stderr

    torch.set_num_threads(1)  # as a stage has
    reference, tokenizer = load_reference(model, torch.float32), AutoTokenizer.from_pretrained(model)
    reader, said = m2ray.open_run(run), {}
    assert reader.layer_numbers == tuple(range(NUM_LAYERS))
    for micro_batch in micro_batches(run):
        expected = [layer_NH.split(micro_batch.token_counts.tolist()) for layer_NH in reference_rows(reference, micro_batch)]
        with torch.inference_mode():
            logits_BTV = reference(torch.from_numpy(micro_batch.token_ids_BT).long(), use_cache=False).logits
        for row, sequence_id in enumerate(micro_batch.sequence_ids.tolist()):
            rows = [reader.layer(layer).sequence(sequence_id) for layer in range(NUM_LAYERS)]
            for layer in range(NUM_LAYERS):
                assert same_bits(rows[layer], expected[layer][row]), (PROMPTS[sequence_id], layer)
            with torch.inference_mode():
                next_token = reference.lm_head(reference.model.norm(rows[-1][-1])).argmax()
            assert next_token == logits_BTV[row, micro_batch.token_counts[row] - 1].argmax()
            said[PROMPTS[sequence_id]] = tokenizer.decode(next_token)
            norms_T = rows[MASSIVE_LAYER].norm(dim=1)
            assert norms_T[0] > 50 * norms_T[1:].max(), "the first token's norm"
            assert rows[MASSIVE_LAYER][0].abs().argmax() == MASSIVE_DIMENSION
    assert len(said) == len(PROMPTS) == 24
    assert said.items() >= KNOWN.items()
