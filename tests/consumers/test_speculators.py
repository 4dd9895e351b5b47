"""speculators 0.9: its data set, its collator and its EAGLE-3 draft, over what m2ray exports."""

import torch
from speculators.train.data import ArrowDataset

from examples.train_draft import batches_of, draft_of, eagle_layers, train
from m2ray.export.exporting import ids_of, plan_export, write_export
from tests.consumers import made_run

STEPS = 20


def export(tmp_path, monkeypatch):
    run = made_run.make(tmp_path, monkeypatch)
    plan = plan_export(run, "speculators")
    assert list(plan.samples.layers) == eagle_layers(plan.num_layers)
    write_export(plan, "speculators", tmp_path / "out")
    return plan


def test_it_sees_the_run_bit_by_bit(tmp_path, monkeypatch) -> None:
    export(tmp_path, monkeypatch)
    rows = ArrowDataset(max_len=64, datapath=str(tmp_path / "out"), on_missing="raise")
    assert len(rows) == len(made_run.ORDER)
    for index, number in enumerate(made_run.ORDER):
        row = rows[index]
        states_TLH = made_run.states(number)
        assert row["input_ids"].tolist() == made_run.token_ids(number).tolist()
        assert row["loss_mask"].tolist() == made_run.mask(number)
        assert made_run.same_bits(row["hidden_states"], states_TLH[:, :-1].flatten(1))
        assert made_run.same_bits(row["verifier_last_hidden_states"], states_TLH[:, -1])


def test_it_learns(tmp_path, monkeypatch) -> None:
    plan = export(tmp_path, monkeypatch)
    torch.manual_seed(0)
    draft = draft_of(tmp_path / "model", list(plan.samples.layers))
    # What it names its layers, m2ray names so too.
    assert [str(layer) for layer in draft.config.eagle_aux_hidden_state_layer_ids] == list(ids_of(plan, "speculators").values())[:-1]
    batch = next(iter(batches_of(tmp_path / "out", 128, len(made_run.ORDER))))
    losses = train(draft, [batch], STEPS, 1e-2)
    print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
