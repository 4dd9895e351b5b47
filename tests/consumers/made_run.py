"""A finished run of a tiny Llama with random weights, as `m2ray extract` leaves it: what trainers are given to read and to train on."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from m2ray.batches import PartSpec
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs
from tests.unit import export_runs

VOCABULARY = 64
LAYERS = export_runs.LAYERS
ORDER = export_runs.ORDER
WIDTH = runs.WIDTH


@cache
def model(dtype: str = "bfloat16") -> Any:
    """Twelve layers of width 24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=runs.NUM_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).to(getattr(torch, dtype)).eval()


def token_ids(sequence_id: int) -> np.ndarray:
    return np.random.default_rng([1, sequence_id]).integers(3, VOCABULARY, runs.token_count(sequence_id)).astype(np.int32)


@cache
def outputs(sequence_id: int, dtype: str = "bfloat16") -> list[torch.Tensor]:
    """Each layer's output [T, H], before the final norm."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append((output[0] if isinstance(output, tuple) else output)[0].clone()))
        for layer in model(dtype).model.layers
    ]
    with torch.inference_mode():
        model(dtype)(torch.from_numpy(token_ids(sequence_id)).long()[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(found) == runs.NUM_LAYERS
    return found


def states(sequence_id: int, layers: Sequence[int] = LAYERS, dtype: str = "bfloat16") -> torch.Tensor:
    """What the run has of a sequence: [T, L, H]."""
    return torch.stack([outputs(sequence_id, dtype)[layer] for layer in layers], dim=1)


def mask(sequence_id: int) -> list[int]:
    return export_runs.mask(sequence_id).tolist()


def normed(sequence_id: int, dtype: str = "bfloat16") -> torch.Tensor:
    """What the whole decoder returns of a sequence: [T, H]."""
    with torch.inference_mode():
        return model(dtype).model(torch.from_numpy(token_ids(sequence_id)).long()[None], use_cache=False).last_hidden_state[0]


def make(folder: Path, monkeypatch: Any, layers: Sequence[int] = LAYERS, dtype: str = "bfloat16") -> Path:
    """The run, in `folder`/run, and its model in `folder`/model."""

    def bits(part: PartSpec, sequence_id: int) -> np.ndarray:
        assert part.layer is not None
        return outputs(sequence_id, dtype)[part.layer].contiguous().view(torch.uint8).numpy()

    monkeypatch.setattr(runs, "token_ids", token_ids)
    monkeypatch.setattr(runs, "bits", bits)
    export_runs.finished_run(LocalStore(folder / "run"), export_runs.parts(layers, dtype))
    model(dtype).save_pretrained(folder / "model", max_shard_size="20KB")  # SpecForge wants an index
    return folder / "run"


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
