"""SAELens 6.54: its activations store over an export as cached activations, and its trainer."""

import numpy as np
import torch
from datasets import Dataset
from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activations_store import ActivationsStore

from m2ray.export.exporting import ids_of, plan_export, write_export
from tests.consumers import made_run

CONTEXT, STEPS, LAYER = 3, 30, 5


class NoModel(torch.nn.Module):
    """The store holds a model, and never runs it: all activations are cached."""

    tokenizer = None


def store_over(tmp_path, monkeypatch) -> ActivationsStore:
    run = made_run.make(tmp_path, monkeypatch)
    export = plan_export(run, "saelens", layers=str(LAYER), context_size=CONTEXT)
    write_export(export, "saelens", tmp_path / "out")
    contexts = sum(len(made_run.token_ids(number)) // CONTEXT for number in made_run.ORDER)
    return ActivationsStore(
        model=NoModel(),
        dataset=Dataset.from_dict({"input_ids": [[1] * CONTEXT]}),
        streaming=False,
        hook_name=ids_of(export, "saelens")[LAYER],
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=made_run.WIDTH,
        n_batches_in_buffer=20,
        total_training_tokens=1,
        store_batch_size_prompts=contexts,
        train_batch_size_tokens=32,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(tmp_path / "out"),
    )


def test_it_sees_the_run_bit_by_bit(tmp_path, monkeypatch) -> None:
    states, token_ids = store_over(tmp_path, monkeypatch).get_raw_llm_batch()
    wanted = [(number, len(made_run.token_ids(number)) // CONTEXT * CONTEXT) for number in made_run.ORDER]
    assert token_ids.tolist() == np.concatenate([made_run.token_ids(number)[:count] for number, count in wanted]).tolist()
    expected = torch.cat([made_run.outputs(number)[LAYER][:count] for number, count in wanted])
    assert states.dtype == torch.float32
    assert made_run.same_bits(states, expected.float())
    assert made_run.same_bits(states.to(torch.bfloat16), expected)


def test_it_learns(tmp_path, monkeypatch) -> None:
    store = store_over(tmp_path, monkeypatch)
    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=made_run.WIDTH, d_sae=64, l1_coefficient=1e-3))
    config = SAETrainerConfig(total_training_samples=32 * STEPS, train_batch_size_samples=32, lr=1e-3, lr_end=1e-3)
    trainer = SAETrainer(config, sae, store)
    batch = next(store)
    losses = [float(trainer.step(batch).loss.detach()) for _ in range(STEPS)]
    print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
