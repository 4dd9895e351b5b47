"""The final norm put on recorded rows gives what the whole decoder returns, bit by bit, or is refused."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2ray.cli import export
from m2ray.errors import CheckpointError, NotInRunError, RunConflictError
from m2ray.model import final_norm as module
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.final_norm import final_norm
from m2ray.model.rehearsal import Rehearsal
from m2ray.model.tensor_table import up_to_layer
from tests.reference import FAMILIES, load_reference, make_family, make_type, micro_batch_of, reference_rows, vocab_size


def fingerprint(folder: Path) -> tuple[str, int]:
    checkpoint = open_checkpoint(str(folder))
    return up_to_layer(checkpoint, checkpoint.config.num_hidden_layers - 1)[0].digest, checkpoint.config.num_hidden_layers


# RMS norm, one that adds 1 to its weights, LayerNorm with a bias, norms without weights, the norm of a model that calls itself its base
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "olmo", "nanochat", "llama4_text", "mamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_what_the_decoder_returns(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    folder = (make_family if model_type in FAMILIES else make_type)(tmp_path / "model", model_type)
    model = load_reference(folder, dtype)
    decoder = getattr(model, "model", model.base_model)
    batch = micro_batch_of([7, 4, 9], vocab_size(folder))
    last_NH = reference_rows(model, batch)[-1]
    with torch.inference_mode():
        expected_BTH = decoder(torch.from_numpy(batch.token_ids_BT).long(), use_cache=False).last_hidden_state
    norm = final_norm(str(folder), *fingerprint(folder), dtype)
    expected_NH = torch.cat([expected_BTH[row, :count] for row, count in enumerate(batch.token_counts.tolist())])
    assert torch.equal(norm(last_NH), expected_NH)
    assert torch.equal(norm(last_NH[3:8]), expected_NH[3:8])  # whatever stands beside a row


def test_rows_that_were_rounded_before_they_were_stored_are_refused(tmp_path: Path) -> None:
    """Mamba's are float32, whatever it computes with."""
    for model_type, computed in (("llama", "bfloat16"), ("mamba", "float32")):
        folder = make_family(tmp_path / model_type, model_type)
        digest, num_layers = fingerprint(folder)
        for stored in ("bfloat16", "float32"):
            options = {"compute_dtype": "bfloat16", "store_dtype": stored}
            job: Any = SimpleNamespace(options=options, fingerprints={"model": digest}, layers_run=num_layers)
            with (
                nullcontext()
                if stored == computed
                else pytest.raises(NotInRunError, match=f"computed rows in {computed} and stored {stored}")
            ):
                export._norm_of(job, str(folder))


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "llama")
    with pytest.raises(RunConflictError, match="is not that of the run"):
        final_norm(str(folder), "0" * 32, 1, torch.bfloat16)


def test_a_norm_that_is_not_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_family(tmp_path / "model", "llama")
    last_states = Rehearsal.last_states

    def scaled(self, dtype):
        model, last_BTH, final_BTH = last_states(self, dtype)
        return model, last_BTH, final_BTH * 2

    monkeypatch.setattr(Rehearsal, "last_states", scaled)
    with pytest.raises(CheckpointError, match="is not the norm of its last layer's rows"):
        final_norm(str(folder), *fingerprint(folder), torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_name", lambda _: "model.layers.0.mlp")
    with pytest.raises(CheckpointError, match="of a llama"):
        final_norm(str(folder), *fingerprint(folder), torch.bfloat16)
