"""NeMo Automodel 0.7: its dataset, the recipe's checks of a cache, its DSpark draft, loss and the target's weights, over what m2ray exports."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nemo_automodel.components.datasets.llm.dspark_cache import (
    build_cached_dspark_dataloader,
    read_manifest,
    read_target_weight_modules,
)
from nemo_automodel.components.speculative.dspark import build_draft_config
from nemo_automodel.components.speculative.dspark.core import DSparkTrainerModule
from nemo_automodel.components.speculative.dspark.draft_qwen3 import Qwen3DSparkModel
from transformers import Qwen3Config

from m2ray.export.exporting import plan_export, write_export
from tests.consumers import made_run

LAYERS = (1, 3, 5, 7, 9, 11)
DTYPE = "float32"  # what its recipe asks for on a CPU
STEPS = 20


class Fields(dict):
    """Model arguments as the recipe hands them to the draft's configuration."""

    __getattr__ = dict.__getitem__


def norm(rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return made_run.model(DTYPE).model.norm(rows)


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    model = made_run.model(DTYPE)
    matrices = {"embedding": model.model.embed_tokens.weight.data, "head": model.lm_head.weight.data}
    target = SimpleNamespace(
        model_type=model.config.model_type,
        vocab_size=model.config.vocab_size,
        shapes={name: tuple(matrix.shape) for name, matrix in matrices.items()},
        pieces=lambda name, dtype: iter(matrices[name].to(dtype).split(7)),
    )
    run = made_run.make(tmp_path, monkeypatch, LAYERS, DTYPE)
    export = plan_export(run, "nemo-dspark", model_folder=str(tmp_path), norm_of=lambda *_: norm, target_of=lambda *_: target)
    write_export(export, "nemo-dspark", tmp_path / "out")
    return tmp_path / "out"


def batch_of(out: Path) -> dict[str, torch.Tensor]:
    """All samples, as its trainer is given them."""
    loader = build_cached_dspark_dataloader(cache_dir=str(out), batch_size=len(made_run.ORDER), shuffle=False)
    return next(iter(loader))


def test_it_sees_the_run_bit_by_bit(out) -> None:
    batch = batch_of(out)
    assert len(batch["input_ids"]) == len(made_run.ORDER)
    for row, number in enumerate(made_run.ORDER):
        ids, states_TLH = made_run.token_ids(number), made_run.states(number, LAYERS, DTYPE)
        count = len(ids)
        assert batch["input_ids"][row, :count].tolist() == ids.tolist()
        assert batch["loss_mask"][row].tolist() == [*made_run.mask(number), *[0] * (len(batch["loss_mask"][row]) - count)]
        assert made_run.same_bits(batch["target_hidden_states"][row, :count], states_TLH[:, :-1].flatten(1))
        assert made_run.same_bits(batch["target_last_hidden_states"][row, :count], made_run.normed(number, DTYPE))
    embedding, head = read_target_weight_modules(str(out))
    assert made_run.same_bits(embedding.weight, made_run.model(DTYPE).model.embed_tokens.weight.data)
    assert made_run.same_bits(head.weight, made_run.model(DTYPE).lm_head.weight.data)


def test_its_recipe_accepts_the_manifest(out) -> None:
    recipe = pytest.importorskip("nemo_automodel.recipes.llm.train_dspark", reason="the recipe needs the whole training stack")
    config = made_run.model(DTYPE).config
    manifest = read_manifest(str(out))
    recipe._validate_cached_dspark_manifest(
        str(out),
        manifest,
        config,
        list(LAYERS[:-1]),
        target_model="/models/m",
        target_model_type=config.model_type,
        seq_length=manifest["seq_length"],
        compute_dtype=torch.float32,
    )


def test_it_learns(out) -> None:
    """Its draft with attention_backend "sdpa": FlexAttention, which its recipe takes on GPUs, has no backward pass on a CPU."""
    fields = made_run.model(DTYPE).config.to_dict() | {"model_type": "qwen3", "head_dim": 8, "layer_types": None}
    arguments = Fields(
        num_draft_layers=1,
        target_layer_ids=read_manifest(str(out))["target_layer_ids"],
        block_size=3,
        mask_token_id=2,
        num_anchors=4,
        markov_rank=8,
        markov_head_type="vanilla",
        confidence_head_alpha=1.0,
        confidence_head_with_markov=True,
    )
    config = build_draft_config(Qwen3Config.from_dict(fields), arguments)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    draft = Qwen3DSparkModel(config)
    embedding, head = read_target_weight_modules(str(out))
    draft.initialize_embeddings_and_head(embed_tokens=embedding, lm_head=head, freeze=True)
    trainer = DSparkTrainerModule(draft, loss_decay_gamma=4.0)
    optimizer = torch.optim.AdamW([each for each in trainer.parameters() if each.requires_grad], lr=5e-3)
    batch = batch_of(out)
    names = ("input_ids", "target_hidden_states", "loss_mask", "target_last_hidden_states")
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(1)  # the same anchors each time
        loss = trainer(**{name: batch[name] for name in names}).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
