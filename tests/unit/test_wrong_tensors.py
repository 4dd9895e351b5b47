"""What loading refuses: tensors that are missing, unknown, of a wrong shape or dtype, each by name and all at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError, StoreError
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensor_table import tensor_table
from m2ray.model.weights import load_weights
from tests.reference import edited, load_span, make_family, make_minimax


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {"fp8": make_minimax(root / "fp8", "fp8"), "llama": make_family(root / "llama", "llama", torch.bfloat16)}


def drop(*keys: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in keys]  # type: ignore[return-value]


def put(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


MOE = "model.layers.3.block_sparse_moe"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("model.layers.3.self_attn.q_norm.weight"), "no tensor for model.layers.3.self_attn.q_norm.weight"),
        (drop(f"{MOE}.gate.weight"), rf"no tensor for model.layers.3.mlp.gate.weight \(published as {MOE}.gate.weight\)"),
        (drop(f"{MOE}.experts.7.w3.weight", f"{MOE}.experts.7.w3.weight_scale_inv"), rf"lacks 1 tensors .*: {MOE}.experts.7.w3.weight\."),
        (drop(f"{MOE}.experts.7.w3.weight"), f"{MOE}.experts.7.w3.weight_scale_inv: a minimax_m2 model has no such tensor"),
        (drop(f"{MOE}.experts.7.w3.weight_scale_inv"), f"{MOE}.experts.7.w3.weight is FP8, but its scales .* are missing"),
        (put(f"{MOE}.experts.12.w2.weight", torch.zeros(128, 128)), f"no room for {MOE}.experts.12.w2.weight"),
        (put("model.layers.3.self_attn.sinks", torch.zeros(4)), "model.layers.3.self_attn.sinks: a minimax_m2 model has no such tensor"),
        (
            put("model.layers.3.mlp.gate.weight", torch.zeros(12, 128)),
            "2 tensors of the checkpoint claim to be model.layers.3.mlp.gate.weight",
        ),
        (put(f"{MOE}.gate.weight", torch.zeros(11, 128)), rf"{MOE}.gate.weight has shape \[11, 128\].*needs \[12, 128\]"),
        (put(f"{MOE}.gate.weight", torch.zeros(12, 128, dtype=torch.int8)), f"{MOE}.gate.weight is of dtype torch.int8"),
        (
            put(f"{MOE}.gate.weight_scale_inv", torch.zeros(1, 1)),
            f"{MOE}.gate.weight is of dtype torch.float32 and yet has scales, {MOE}.gate.weight_scale_inv",
        ),
        (put("model.layers.3.self_attn.q_proj.weight_scale_inv", torch.zeros(1, 1)), r"needs \[2, 1\] of"),
        (
            put(f"{MOE}.experts.7.w1.weight", torch.zeros(64, 128, dtype=torch.bfloat16)),
            rf"{MOE}.experts.7.w1.weight has shape \[64, 128\]",
        ),
    ],
)
def test_a_wrong_tensor_in_the_span_is_named_and_none_outside_matters(
    originals: dict[str, Path], tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = edited(originals["fp8"], tmp_path / "wrong", edit)
    with pytest.raises(CheckpointError, match=message):
        load_span(folder, LayerSpan(2, 4))
    with pytest.raises(CheckpointError, match=message):
        tensor_table(open_checkpoint(str(folder)))
    load_span(folder, LayerSpan(4, 5))


def test_all_wrong_tensors_are_listed_at_once(originals: dict[str, Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.1.post_attention_layernorm.weight"] = torch.zeros(5)
        tensors["model.layers.2.unknown"] = torch.zeros(5)

    with pytest.raises(CheckpointError, match="3 problems") as caught:
        tensor_table(open_checkpoint(str(edited(originals["llama"], tmp_path / "wrong", edit))))
    for name in ("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight", "model.layers.2.unknown"):
        assert name in str(caught.value)


def test_fp8_without_a_quantization_config_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(originals["fp8"], tmp_path / "fp8", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no quantization_config"):
        tensor_table(open_checkpoint(str(folder)))


def test_weights_that_float16_cannot_hold_are_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    folder = edited(originals["llama"], tmp_path / "large", lambda tensors: tensors[key].view(-1)[:1].fill_(1e5))
    load_span(folder, LayerSpan(1, 2), torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"{key} holds 99\d\d\d, which float16 cannot"):
        load_span(folder, LayerSpan(1, 2), torch.float16)


def test_a_file_cut_after_the_check_stops_the_load(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(originals["llama"], tmp_path / "cut", lambda _: None)
    checkpoint = open_checkpoint(str(folder))
    decoder = DecoderSpan(build_skeleton(checkpoint.config, torch.float32), LayerSpan(0, 5), torch.device("cpu"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(StoreError, match="ends at byte"):
        load_weights(checkpoint, decoder, lambda *_: None)
