"""The audit's reference, as accelerate deals it out, is the model that the tests hold every family against."""

from pathlib import Path

import pytest
import torch
from torch import nn

from m2ray.audit.reference import Reference
from m2ray.audit.routers import Router
from m2ray.audit.tolerance import has_router
from m2ray.errors import CheckpointError
from tests.packed import make_packed
from tests.reference import (
    DATA,
    LENGTHS,
    edited,
    load_reference,
    make_family,
    make_minimax,
    make_wrapper,
    micro_batch_of,
    reference_rows,
    same_bits,
    vocab_size,
)

FAMILIES = ["minimax_m2", *sorted(path.stem for path in (DATA / "families").glob("*.json"))]
ROUTED = {
    *("deepseek_v3", "deepseek_v4", "glm4_moe", "glm_moe_dsa", "gpt_oss", "hy_v4"),
    *("minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_own_model_of_every_family(tmp_path: Path, family: str) -> None:
    folder = make_minimax(tmp_path / family, "fp8") if family == "minimax_m2" else make_family(tmp_path / family, family, torch.bfloat16)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    model = load_reference(folder, torch.float32)
    is_real_BT = torch.arange(micro_batch.token_ids_BT.shape[1]) < torch.from_numpy(micro_batch.token_counts)[:, None]
    found: dict[int, torch.Tensor] = {}
    with Reference(str(folder), "float32", model.config._attn_implementation, on_cpu=True) as reference:
        assert reference.in_memory
        assert has_router(reference.config) == (family in ROUTED)
        layers = range(reference.config.num_hidden_layers)
        reference.run(
            torch.from_numpy(micro_batch.token_ids_BT).long(),
            {("residual", layer) for layer in layers},
            lambda _, layer, output: found.update({layer: output[is_real_BT]}),
        )
    expected = reference_rows(model, micro_batch)
    assert [same_bits(found[layer], rows) for layer, rows in enumerate(expected)] == [True] * len(layers)


@pytest.mark.parametrize(("family", "where"), [*((family, "memory") for family in FAMILIES), ("llama", "disk"), ("minimax_m2", "disk")])
def test_in_float32_it_computes_with_the_weights_that_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, where: str
) -> None:
    folder = make_minimax(tmp_path / family, "fp8") if family == "minimax_m2" else make_family(tmp_path / family, family, torch.bfloat16)
    micro_batch, model = micro_batch_of(LENGTHS, vocab_size(folder)), load_reference(folder, torch.bfloat16)
    is_real_BT = torch.arange(micro_batch.token_ids_BT.shape[1]) < torch.from_numpy(micro_batch.token_counts)[:, None]
    if where == "disk":
        num_bytes = sum(tensor.nbytes for tensor in model.parameters())
        monkeypatch.setattr("m2ray.audit.reference.get_max_memory", lambda: {"cpu": num_bytes // 2})
    with Reference(str(folder), "bfloat16", model.config._attn_implementation, on_cpu=True) as reference:
        assert reference.in_memory == (where == "memory")
        layers = range(reference.config.num_hidden_layers)

        def rows() -> list[torch.Tensor]:
            found: dict[int, torch.Tensor] = {}
            token_ids_BT = torch.from_numpy(micro_batch.token_ids_BT).long()
            places = {("residual", layer) for layer in layers}
            reference.run(token_ids_BT, places, lambda _, layer, output: found.update({layer: output[is_real_BT].clone()}))
            return [found[layer] for layer in layers]

        before = rows()
        with reference.in_float32():
            wide = rows()
        assert list(map(same_bits, rows(), before)) == [True] * len(layers)
    assert {each.dtype for each in wide} == {torch.float32}
    assert list(map(same_bits, wide, reference_rows(model.float(), micro_batch))) == [True] * len(layers)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_5"])
def test_it_is_transformers_own_multimodal_model_given_text(tmp_path: Path, name: str) -> None:
    folder = make_wrapper(tmp_path / name, name)
    micro_batch = micro_batch_of(LENGTHS, 400)
    is_real_BT = torch.arange(micro_batch.token_ids_BT.shape[1]) < torch.from_numpy(micro_batch.token_counts)[:, None]
    found: dict[int, torch.Tensor] = {}
    with Reference(str(folder), "float32", "sdpa", on_cpu=True) as reference:
        layers = range(reference.config.num_hidden_layers)
        reference.run(
            torch.from_numpy(micro_batch.token_ids_BT).long(),
            {("residual", layer) for layer in layers},
            lambda _, layer, output: found.update({layer: output[is_real_BT]}),
        )
    expected = reference_rows(load_reference(folder, torch.float32), micro_batch)
    assert [same_bits(found[layer], rows) for layer, rows in enumerate(expected)] == [True] * len(layers)


class Returning(nn.Module):
    """A module that returns these tensors."""

    def __init__(self, *returned: torch.Tensor) -> None:
        super().__init__()
        self.returned = returned

    def forward(self) -> tuple[torch.Tensor, ...]:
        return self.returned


IDS, LOGITS = torch.arange(12).reshape(6, 2), torch.arange(24.0).sin().reshape(6, 4)
WEIGHTS = LOGITS[:, :2].exp()


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        pytest.param([(LOGITS, WEIGHTS, IDS)], {"router_topk", "router_logits"}, id="logits"),
        pytest.param([(IDS, WEIGHTS)], {"router_topk"}, id="none"),
        pytest.param([(LOGITS.softmax(1), WEIGHTS, IDS)], {"router_topk"}, id="probabilities"),
        pytest.param([(LOGITS, LOGITS.sigmoid(), WEIGHTS, IDS)], {"router_topk"}, id="two that may be logits"),
        pytest.param([(LOGITS, WEIGHTS)], set(), id="no ids"),
        pytest.param([(LOGITS, WEIGHTS, IDS), (LOGITS, WEIGHTS, IDS)], set(), id="two routers"),
    ],
)
def test_a_router_is_told_by_what_it_returns(modules: list[tuple[torch.Tensor, ...]], told: set[str]) -> None:
    layer = nn.ModuleList(Returning(*returned) for returned in modules)
    router = Router(layer)
    for each in layer:
        each()
    found = router.found(3)
    router.close()
    assert set(found) == told
    assert not told or [values.shape for values in found["router_topk"]] == [(3, 2, 2), (3, 2, 2)]
    assert "router_logits" not in told or torch.equal(found["router_logits"][0].flatten(0, 1), LOGITS)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "llama", "llama")
    for file in folder.glob("*.safetensors"):
        if "00001-of" in file.name or file.name == "model.safetensors":
            file.unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        Reference(str(folder), "float32", "sdpa", on_cpu=True)


@pytest.mark.parametrize("fmt", ["modelopt-fp8", "nvfp4-hf-quant"])
def test_a_layout_that_transformers_would_take_for_weights_is_refused(tmp_path: Path, fmt: str) -> None:
    folder = make_packed(tmp_path / "model", "llama", fmt)
    with pytest.raises(CheckpointError, match="transformers does not read modelopt, as .* is quantised"):
        Reference(str(folder), "float32", "sdpa", on_cpu=True)


def test_experts_that_transformers_unpacks_without_their_global_scale_are_refused(tmp_path: Path) -> None:
    folder = make_packed(tmp_path / "model", "qwen3_moe", "nvfp4-pack-quantized")
    with pytest.raises(CheckpointError, match="unpacks experts in NVFP4 of compressed-tensors, as .* has them, without their global scale"):
        Reference(str(folder), "float32", "sdpa", on_cpu=True)


def test_scales_that_transformers_leaves_unread_are_told(tmp_path: Path) -> None:
    """It reads `weight_scale_inv` alone under `quant_method: fp8`, and takes FP8 without it for weights."""
    folder = edited(make_packed(tmp_path / "model", "llama", "fp8-static"), tmp_path / "renamed", _rename_scales)
    with pytest.raises(CheckpointError, match="it leaves scales of weights unread, such as model.layers.0.mlp.down_proj.weight_scale"):
        Reference(str(folder), "float32", "sdpa", on_cpu=True)


def _rename_scales(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        tensors[key.removesuffix("_inv")] = tensors.pop(key)
