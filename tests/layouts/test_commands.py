"""`m2ray extract` over two stages, of a checkpoint in each layout: the rows of transformers with what numpy makes of the same codes."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.make_checkpoint import make_checkpoint
from tests.layouts.random_checkpoints import pack_checkpoint
from tests.ray.conftest import RayCluster, cluster  # noqa: F401 - a fixture
from tests.ray.test_extract import assert_equals_transformers, words
from tests.reference import DATA

TIMEOUT_S = 600.0
"""Of a run that took 57 s where two cores had work for eight: this suite has to pass beside other work."""

SIZES = {"layers": 3, "hidden_size": 96, "intermediate_size": 160, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 384}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", "fp8"),
        ("qwen3_moe", "float-channel"),
        ("qwen3_moe", "int8"),
        ("qwen3_moe", "int4"),
        ("qwen3_moe", "int4-int8"),
        ("llama", "int8-first"),
        ("llama", "int4-zeros"),
        ("qwen3_moe", "nvfp4-ct"),
        ("qwen3_moe", "nvfp4"),
        ("llama", "modelopt-fp8"),
        ("llama", "mxfp4-ct"),
        ("gpt_oss", "mxfp4"),
        ("qwen3_moe", "awq"),
        ("llama", "gptq"),
        ("llama", "gptq-v2"),
    ],
)
def test_rows_of_a_run_are_those_of_the_unpacked_weights(cluster: RayCluster, family: str, layout: str, tmp_path: Path) -> None:  # noqa: F811
    config = json.loads((DATA / "families" / f"{family}.json").read_text()) | {"moe_intermediate_size": 32}
    sizes = (
        SIZES
        | ({"num_experts": 4} if family == "qwen3_moe" else {})
        | ({"head_dim": 24, "hidden_size": 96, "intermediate_size": 120} if layout == "int4-zeros" else {})
    )
    make_checkpoint(tmp_path / "base", config, overrides=sizes, fmt="bf16", seed=5)
    packed, plain = pack_checkpoint(tmp_path / "base", tmp_path, layout, seed=7)
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(["sea", "wind", "stone"], int(count))) for count in rng.integers(1, 20, 6)]
    prompts.write_text("".join(json.dumps({"id": f"row-{number}", "text": text}) + "\n" for number, text in enumerate(texts)))
    extracted = cluster.run("m2ray", "extract", *words(packed, prompts, run, "--stages", "2"), timeout_s=TIMEOUT_S)
    assert extracted.returncode == 0, extracted.stdout + extracted.stderr
    assert_equals_transformers(run, plain, range(3))
