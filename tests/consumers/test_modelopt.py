"""NVIDIA ModelOpt 0.47: its offline dataset, collator and EAGLE-3 model, which puts the final norm on recorded rows, over what m2ray exports."""

import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its steps are compiled, which takes a minute and a compiler

import modelopt.torch.speculative as mtsp
import pytest
import torch
from modelopt.torch.speculative.eagle.default_config import default_eagle_config
from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator, OfflineSupervisedDataset
from transformers import LlamaForCausalLM

from m2ray.export.exporting import plan_export, write_export
from tests.consumers import made_run

TRAIN_LENGTH = 16
STEPS = 20


def batch_of(folder: Path, monkeypatch, dtype: str):
    """All samples, as its trainer is given them."""
    run = made_run.make(folder, monkeypatch, dtype=dtype)
    write_export(plan_export(run, "modelopt"), "modelopt", folder / "out")
    rows = OfflineSupervisedDataset(sorted(map(str, (folder / "out").rglob("*.pt"))), answer_only_loss=True)
    assert len(rows) == len(made_run.ORDER)
    return EagleOfflineDataCollator(TRAIN_LENGTH)([rows[index] for index in range(len(rows))])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_sees_the_run_bit_by_bit(dtype, tmp_path, monkeypatch) -> None:
    batch = batch_of(tmp_path, monkeypatch, dtype)
    of_base = batch["base_model_outputs"]
    assert of_base["base_hidden_prenorm"] is True
    for row, number in enumerate(made_run.ORDER):
        ids, states_TLH = made_run.token_ids(number), made_run.states(number, dtype=dtype)
        count = len(ids)
        assert batch["input_ids"][row, :count].tolist() == ids.tolist()
        assert batch["loss_mask"][row, :count].tolist() == made_run.mask(number)
        assert made_run.same_bits(of_base["aux_hidden_states"][row, :count], states_TLH[:, :-1].flatten(1))
        assert made_run.same_bits(of_base["base_model_hidden_states"][row, :count], states_TLH[:, -1])


def test_it_learns(tmp_path, monkeypatch) -> None:
    """In float32: its loss in bfloat16 is too coarse for a few steps of a model without training."""
    batch = batch_of(tmp_path, monkeypatch, "float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    architecture = default_eagle_config | {
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": list(made_run.LAYERS[:-1]),
    }
    torch.manual_seed(0)
    mtsp.convert(model, mode=[("eagle", {"eagle_offline": True, "eagle_architecture_config": architecture})])
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
