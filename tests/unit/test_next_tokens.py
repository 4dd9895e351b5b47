"""The logit lens of the last layer says what the model itself says next; a head is exported only where it says that by itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2ray.cli import export
from m2ray.errors import CheckpointError
from m2ray.model import target_weights
from m2ray.model.next_tokens import next_tokens
from tests.reference import load_reference, make_family, micro_batch_of, reference_rows, vocab_size
from tests.unit.test_final_norm import fingerprint


# a head of its own, the embedding's, one with a bias, scores that are divided, multiplied, capped
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "granite", "cohere2", "gemma2"])
def test_it_is_what_the_model_says(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_weights, "_PIECE_BYTES", 4096)  # several pieces
    folder = make_family(tmp_path / "model", model_type)
    model = load_reference(folder, torch.float32)
    batch = micro_batch_of([7, 4, 9], vocab_size(folder))
    rows_NH = reference_rows(model, batch)[-1]
    with torch.inference_mode():
        logits_BTV = model(torch.from_numpy(batch.token_ids_BT).long(), use_cache=False).logits
    shares_NV = torch.cat([logits_BTV[row, :count] for row, count in enumerate(batch.token_counts.tolist())]).softmax(dim=-1)
    ids_N, found_N = next_tokens(str(folder), *fingerprint(folder), torch.float32)(rows_NH)
    assert torch.equal(ids_N, shares_NV.argmax(dim=-1))
    assert torch.allclose(found_N, shares_NV.max(dim=-1).values, rtol=1e-4)


def test_the_norm_takes_rows_as_the_model_hands_them_to_it(tmp_path: Path) -> None:
    """Mamba's are float32 in bfloat16 too, and its head takes what the norm makes of them in its own dtype."""
    folder = make_family(tmp_path / "model", "mamba")
    model = load_reference(folder, torch.bfloat16)
    batch = micro_batch_of([7, 4, 9], vocab_size(folder))
    rows_NH = reference_rows(model, batch)[-1]
    assert rows_NH.dtype == torch.float32
    with torch.inference_mode():
        normed_BTH = model.backbone(torch.from_numpy(batch.token_ids_BT).long(), use_cache=False).last_hidden_state
        shares_BTV = (normed_BTH.to(torch.bfloat16).float() @ model.lm_head.weight.float().T).softmax(dim=-1)
    shares_NV = torch.cat([shares_BTV[row, :count] for row, count in enumerate(batch.token_counts.tolist())])
    ids_N, found_N = next_tokens(str(folder), *fingerprint(folder), torch.bfloat16)(rows_NH)
    assert torch.equal(ids_N, shares_NV.argmax(dim=-1))
    assert torch.allclose(found_N, shares_NV.max(dim=-1).values, rtol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "phi", "granite"])
def test_a_head_whose_products_are_not_the_scores_is_no_exports(tmp_path: Path, model_type: str) -> None:
    folder = make_family(tmp_path / "model", model_type)
    digest, num_layers = fingerprint(folder)
    job: Any = SimpleNamespace(fingerprints={"model": digest}, layers_run=num_layers)
    if model_type == "llama":
        assert export._target_of(job, str(folder)).head_bias is None
        return
    with pytest.raises(CheckpointError, match=f"of a {model_type}, scores are more than products of the last states and the head"):
        export._target_of(job, str(folder))
