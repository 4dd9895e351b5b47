"""What docs/models.md says of a model type, held against what comes of it now."""

import random
import re
from pathlib import Path

import pytest

from scripts.model_outcomes import PROVED, causal_types, outcome_of, outcomes_on_page, sites_of, sites_on_page

DENSE = ("gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
EXPERTS = (
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "hunyuan_v1_moe",
    "llama4_text",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "qwen3_moe",
)
HYBRID = (
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba2",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_next",
)
MULTIMODAL = (
    "gemma3",
    "gemma4",
    "kimi_k25",
    "llama4",
    "llava_onevision",
    "minimax_m3_vl",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_5_moe",
    "qwen3_vl_moe",
)
NAMED = (*DENSE, *EXPERTS, *HYBRID, *MULTIMODAL)


def sample(share: int) -> list[str]:
    """One of two halves of a tenth of the types that are not named, the same each time."""
    rest = [model_type for model_type in causal_types() if model_type not in NAMED]
    return sorted(random.Random(15).sample(rest, len(rest) // 10))[share::2]


def assert_page_is_right(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove the type's default configuration afresh and compare; figures, which machines may round differently, are left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, written = outcome_of(model_type), outcomes_on_page()[model_type]
    assert _without_figures(found) == _without_figures(written), f"docs/models.md says otherwise: run scripts/models\n{found}"
    assert model_type not in NAMED or found == PROVED
    assert found != PROVED or sites_of(model_type) == sites_on_page()[model_type]


def _without_figures(outcome: str) -> str:
    return re.sub(r"\d[\d.,e+-]*", "#", outcome)
