"""SAELens 6.54, dictionary_learning and sparsify train on a run's rows as the readers hand them over, without a copy of the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.training import trainSAE
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sparsify import SparseCoder, SparseCoderConfig

import m2ray
from m2ray.activations.reading.reader import RunReader
from m2ray.batches import PartSpec
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

STEPS, ROWS, LAYER = 30, 32, 7


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunReader:
    """Rows near a plane of eight dimensions: there is something to learn."""
    plane = np.random.default_rng(0).standard_normal((8, runs.WIDTH))

    def bits(part: PartSpec, sequence_id: int) -> np.ndarray:
        rng = np.random.default_rng([part.layer or 0, sequence_id])
        rows = torch.from_numpy(rng.standard_normal((runs.token_count(sequence_id), 8)) @ plane)
        return rows.to(torch.bfloat16).view(torch.uint8).numpy()

    monkeypatch.setattr(runs, "bits", bits)
    runs.finished_run(LocalStore(tmp_path))
    return m2ray.open_run(tmp_path).layer(LAYER)


class Seen:
    """An iterator that remembers what passed."""

    def __init__(self, rows) -> None:
        self.rows, self.batches = rows, []

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        self.batches.append(next(self.rows))
        return self.batches[-1]


def assert_of_the_run(batches: list[torch.Tensor], view: RunReader) -> None:
    """Whole epochs but the rows that fill no batch, each row the run's own bits."""
    stored = view.tensor()
    of_epoch = len(stored) // ROWS
    known = {row.tobytes() for row in stored.view(torch.uint8).numpy()}
    for first in range(0, len(batches) - of_epoch, of_epoch):
        rows = torch.cat(batches[first : first + of_epoch])
        found = [row.tobytes() for row in rows.to(torch.bfloat16).view(torch.uint8).numpy()]
        assert torch.equal(rows, rows.to(torch.bfloat16).to(rows.dtype))
        assert len(set(found)) == of_epoch * ROWS
        assert known.issuperset(found)


def test_saelens_trains_on_the_provider(view: RunReader) -> None:
    seen, losses = Seen(view.as_data_provider(rows=ROWS)), []
    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=runs.WIDTH, d_sae=64, l1_coefficient=1e-3))
    config = SAETrainerConfig(total_training_samples=ROWS * STEPS, train_batch_size_samples=ROWS, lr=3e-3, lr_end=3e-4)

    class Watched(SAETrainer):
        def _train_step(self, *words, **named):
            output = super()._train_step(*words, **named)
            losses.append(float(output.loss.detach()))
            return output

    Watched(config, sae, seen).fit()
    assert len(losses) == len(seen.batches) == STEPS
    assert losses[-1] < losses[0], losses
    assert_of_the_run(seen.batches, view)


def test_dictionary_learning_trains_on_the_iterator(view: RunReader, tmp_path: Path) -> None:
    seen = Seen(view.iterator(rows=ROWS, epochs=None, dtype=torch.float32))
    common = {"trainer": StandardTrainer, "steps": STEPS, "activation_dim": runs.WIDTH, "dict_size": 64, "layer": LAYER, "lm_name": "m"}
    config = {**common, "warmup_steps": 2, "sparsity_warmup_steps": 2, "lr": 3e-3, "l1_penalty": 1e-3, "device": "cpu", "seed": 0}
    losses = []

    class Watched(StandardTrainer):
        def update(self, step, activations):
            losses.append(float(self.loss(activations, step).detach()))
            super().update(step, activations)

    trainSAE(data=seen, trainer_configs=[{**config, "trainer": Watched}], steps=STEPS, device="cpu")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0], losses
    assert_of_the_run(seen.batches, view)


def test_sparsify_trains_on_the_iterator(view: RunReader) -> None:
    """Its Trainer runs a model and takes no activations; its SparseCoder and the loss that its Trainer takes of it are its own."""
    torch.manual_seed(0)
    coder = SparseCoder(runs.WIDTH, SparseCoderConfig(num_latents=64, k=8), dtype=torch.float32)
    optimizer, losses, batches = torch.optim.Adam(coder.parameters(), lr=3e-3), [], []
    for rows in view.iterator(rows=ROWS, epochs=None, dtype=torch.float32):
        batches.append(rows)
        loss = coder(rows).fvu
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if len(losses) == STEPS:
            break
    assert losses[-1] < losses[0], losses
    assert_of_the_run(batches, view)
