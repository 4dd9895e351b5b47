"""SpecForge 0.2: its offline reader, loader, EAGLE-3 model, strategy and optimizer, over what m2ray exports."""

import os

os.environ["SPECFORGE_DEVICE"] = "cpu"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its small functions are compiled, which takes a minute and a compiler
os.environ.setdefault("TRITON_INTERPRET", "1")  # its loss is a kernel for GPUs

import json

import pytest
import torch
from specforge.algorithms.builtin import builtin_algorithm_registry
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
from specforge.modeling.target.target_head import TargetHead
from specforge.optimizer import BF16Optimizer
from specforge.runtime.data_plane import FeatureDataLoader, LocalFeatureStore
from specforge.training.strategies.base import Eagle3TrainStrategy

from m2ray.export.exporting import plan_export, write_export
from tests.consumers import made_run

STEPS = 20


def norm(rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return made_run.model().model.norm(rows)


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """All samples, as its trainer is given them."""
    run = made_run.make(tmp_path, monkeypatch)
    export = plan_export(run, "specforge", model_folder=str(tmp_path / "model"), norm_of=lambda *_: norm)
    write_export(export, "specforge", tmp_path / "out")
    algorithm = builtin_algorithm_registry().resolve("eagle3")
    provider = algorithm.providers.offline_for("text")
    refs = provider.build_reader(str(tmp_path / "out"), run_id="m2ray", ttt_length=3, max_len=64).read()
    assert len(refs) == len(made_run.ORDER)
    loader = FeatureDataLoader(
        LocalFeatureStore("m2ray"),
        refs=refs,
        batch_size=len(refs),
        collate_fn=provider.build_collator(),
        per_sample_transform=provider.build_normalizer(64),
        strategy=algorithm.name,
    )
    return next(iter(loader))


def test_it_sees_the_run_bit_by_bit(batch) -> None:
    for row, number in enumerate(made_run.ORDER):
        states_TLH, ids, mask = made_run.states(number), made_run.token_ids(number), made_run.mask(number)
        count = len(ids)
        assert batch.tensors["input_ids"][row, :count].tolist() == ids.tolist()
        assert batch.tensors["loss_mask"][row, :count].tolist() == [*mask[:-1], 0]  # it never learns behind the end
        assert made_run.same_bits(batch.tensors["hidden_state"][row, :count], states_TLH[:, :-1].flatten(1))
        assert made_run.same_bits(batch.tensors["target"][row, :count], norm(states_TLH[:, -1]))


@pytest.mark.timeout(900)
def test_it_learns(batch, tmp_path) -> None:
    config = made_run.model().config
    fields = {
        **{name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")},
        **{name: getattr(config, name) for name in ("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act")},
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.vocab_size,
    }
    (tmp_path / "draft.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    draft = AutoDraftModel.from_config(
        AutoDraftModelConfig.from_file(str(tmp_path / "draft.json")), attention_backend="sdpa", torch_dtype=torch.bfloat16
    )
    draft.load_embedding(str(tmp_path / "model"))
    draft.freeze_embedding()
    torch.save(
        {"t2d": torch.ones(config.vocab_size, dtype=torch.bool), "d2t": torch.zeros(config.vocab_size, dtype=torch.long)},
        tmp_path / "vocabulary.pt",
    )
    draft.load_vocab_mapping(str(tmp_path / "vocabulary.pt"))
    head = TargetHead.from_pretrained(str(tmp_path / "model"))
    strategy = Eagle3TrainStrategy(OnlineEagle3Model(draft, length=3, attention_backend="sdpa"), target_head=head)
    optimizer = BF16Optimizer(strategy.trainable_module(), lr=1e-2, total_steps=STEPS, warmup_ratio=0.0)
    losses = []
    for _ in range(STEPS):
        loss = strategy.forward_loss(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
