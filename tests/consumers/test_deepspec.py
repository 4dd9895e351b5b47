"""DeepSpec (deepseek-ai/DeepSpec, commit afdfa7c): its cache dataset, checks, collator and DSpark draft, over what m2ray exports.

It is no package: DEEPSPEC names a checkout of it. FlexAttention, without which its drafts do not run, has no backward pass on a CPU: its loss is
computed here, no step is taken.
"""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its masks are compiled, which takes a minute and a compiler

import pytest
import torch
from torch import distributed
from transformers import Qwen3Config

from m2ray.export.exporting import plan_export, write_export
from tests.consumers import made_run

LAYERS = (1, 3, 5, 7, 9, 11)


class Fields(dict):
    """Model arguments as its configuration files hold them."""

    __getattr__ = dict.__getitem__


def norm(rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return made_run.model().model.norm(rows)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    if not os.environ.get("DEEPSPEC"):
        pytest.skip("DEEPSPEC names no checkout of DeepSpec")
    monkeypatch.syspath_prepend(os.environ["DEEPSPEC"])
    from deepspec.data.target_cache_dataset import CacheDataset

    run = made_run.make(tmp_path, monkeypatch, LAYERS)
    export = plan_export(run, "deepspec", model_folder=str(tmp_path / "model"), norm_of=lambda *_: norm)
    write_export(export, "deepspec", tmp_path / "out")
    return CacheDataset(str(Path(tmp_path / "out")))


def test_it_sees_the_run_bit_by_bit(rows) -> None:
    from deepspec.data.target_cache_dataset import CacheCollator

    assert len(rows) == len(made_run.ORDER)
    batch = CacheCollator()([rows[index] for index in range(len(rows))])
    for row, number in enumerate(made_run.ORDER):
        ids, states_TLH = made_run.token_ids(number), made_run.states(number, LAYERS)
        count = len(ids)
        assert batch["attention_mask"][row].sum() == count
        assert batch["input_ids"][row, :count].tolist() == ids.tolist()
        assert batch["loss_mask"][row, :count].tolist() == made_run.mask(number)
        assert made_run.same_bits(batch["target_hidden_states"][row, :count], states_TLH[:, :-1].flatten(1))
        assert made_run.same_bits(batch["target_last_hidden_states"][row, :count], made_run.normed(number))


def test_its_trainer_accepts_it_and_has_a_loss(rows) -> None:
    from deepspec.data.target_cache_dataset import CacheCollator, validate_train_cache
    from deepspec.modeling.dspark.loss import compute_dspark_loss
    from deepspec.modeling.dspark.qwen3 import Qwen3DSparkModel
    from deepspec.modeling.dspark.qwen3.config import build_draft_config

    fields = made_run.model().config.to_dict() | {"model_type": "qwen3", "head_dim": 8, "layer_types": None}
    arguments = Fields(
        num_draft_layers=1,
        target_layer_ids=list(LAYERS[:-1]),
        block_size=3,
        mask_token_id=2,
        num_anchors=4,
        markov_rank=8,
        markov_head_type="vanilla",
        confidence_head_alpha=1.0,
        confidence_head_with_markov=True,
    )
    config = build_draft_config(Qwen3Config.from_dict(fields), arguments)
    torch.manual_seed(0)
    draft = Qwen3DSparkModel(config).to(torch.bfloat16)
    validate_train_cache(
        train_dataset=rows,
        draft_model=SimpleNamespace(target_layer_ids=config.target_layer_ids, config=config),
        target_model_name_or_path="/models/m",
    )
    target = made_run.model()
    draft.initialize_embeddings_and_head(embed_tokens=target.get_input_embeddings(), lm_head=target.get_output_embeddings(), freeze=True)
    batch = CacheCollator()([rows[index] for index in range(len(rows))])
    batch["input_ids"] = batch["input_ids"].long()  # as its CUDAPrefetcher does on the way to the GPU
    names = ("input_ids", "target_hidden_states", "loss_mask", "target_last_hidden_states")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # its loss counts over all ranks
    try:
        with torch.no_grad():
            outputs = draft(**{name: batch[name] for name in names})
            loss = compute_dspark_loss(
                outputs=outputs, loss_decay_gamma=4.0, ce_loss_alpha=0.1, l1_loss_alpha=0.9, confidence_head_alpha=1.0
            )
    finally:
        distributed.destroy_process_group()
    print(f"loss: {float(loss):.4f}")
    assert torch.isfinite(loss)
