"""scripts/make_checkpoint.py: the random values make mistakes visible, in transformers' own models."""

import json
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from scripts.checkpoint_formats.table import FORMATS
from scripts.make_checkpoint import RandomWeights, make_checkpoint, plan_tensors, resolve_config

DATA = Path(__file__).parents[1] / "data"
SMALL = {"hidden_size": 256, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "vocab_size": 1024}
SMALL_M2 = {**SMALL, "num_experts": 8, "experts_per_token": 2, "layers": 3}


def config_of(family):
    return json.loads((DATA / family / "config.json").read_text())


def read(folder):
    """Every tensor of a folder's safetensors files, in no order."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def load(folder):
    """transformers' own model in float32: weights through bf16, the router as it is on disk."""
    config = json.loads((folder / "config.json").read_text())
    quantised = config.get("quantization_config")
    options = (
        {"quantization_config": FineGrainedFP8Config(dequantize=True, modules_to_not_convert=quantised["modules_to_not_convert"])}
        if quantised
        else {}
    )
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not any(info.values()), info
    model = model.float().eval()
    for name, tensor in read(folder).items():
        if tensor.dtype == torch.float32 and not name.endswith("_scale_inv"):
            model.state_dict()[name.replace("block_sparse_moe", "mlp")].copy_(tensor)
    return model


def run(model):
    """The hidden states before and after every layer, and each router's logits and correction bias, for 2 prompts of 150 tokens."""
    before, after, routed = [], [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _module, args: before.append(args[0]))
        layer.register_forward_hook(lambda _module, _args, output: after.append(output))
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _module, args, output: routed.append((output[0], args[1])))
    ids = torch.randint(6, model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(before) == len(after) == model.config.num_hidden_layers
    return before, after, routed


def assert_updates_in_range(before, after):
    """At every token of every layer the update is 0.1 to 2 of the layer's input."""
    for layer, (hidden, updated) in enumerate(zip(before, after, strict=True)):
        ratio = (updated - hidden).norm(dim=-1) / hidden.norm(dim=-1)
        assert ratio.min() > 0.1, layer
        assert ratio.max() < 2, layer


@pytest.fixture(scope="module")
def m2_fp8(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "m2-fp8"
    make_checkpoint(out, config_of("minimax_m2"), overrides=SMALL_M2, fmt="fp8", seed=3)
    return out


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("fmt", ["fp8", "bf16"])
def test_dense_families_are_written_by_the_same_rules(family, fmt, tmp_path):
    overrides = {**SMALL, "layers": 2}
    make_checkpoint(tmp_path / "dense", config_of(family), overrides=overrides, fmt=fmt, seed=3)
    dtypes = {name: tensor.dtype for name, tensor in read(tmp_path / "dense").items()}
    assert dtypes["model.layers.1.mlp.gate_proj.weight"] == (torch.float8_e4m3fn if fmt == "fp8" else torch.bfloat16)
    assert ("model.layers.1.mlp.gate_proj.weight_scale_inv" in dtypes) == (fmt == "fp8")
    assert dtypes["lm_head.weight"] == dtypes["model.layers.0.input_layernorm.weight"] == torch.bfloat16
    assert ("model.layers.0.self_attn.q_norm.weight" in dtypes) == (family == "qwen3")
    assert_updates_in_range(*run(load(tmp_path / "dense"))[:2])


@pytest.mark.parametrize("depth", [3, 62])
def test_updates_and_routing_show_mistakes(depth, tmp_path):
    make_checkpoint(
        tmp_path / "m2", config_of("minimax_m2"), overrides={**SMALL_M2, "hidden_size": 128, "layers": depth}, fmt="fp8", seed=5
    )
    before, after, routed = run(load(tmp_path / "m2"))
    assert_updates_in_range(before, after)
    assert len(routed) == depth
    changed, rounded, used = [], [], []
    for logits, bias in routed:
        scores = logits.sigmoid()
        chosen, unbiased, coarse = (chosen_experts(scores + shift) for shift in (bias, 0, bias.bfloat16().float()))
        changed.append((chosen != unbiased).any(-1).float().mean())
        rounded.append((chosen != coarse).any(-1).float().mean())
        used.append(chosen.unique().numel())
    assert min(changed) > 0.1
    assert torch.stack(rounded).mean() > 0.001
    assert min(used) == 8


def chosen_experts(scores):
    return scores.topk(2, -1).indices.sort(-1).values


def test_norms_and_bias_lie_around_one(m2_fp8):
    for name, tensor in read(m2_fp8).items():
        if "norm" in name or name.endswith("correction_bias"):
            assert (tensor.float() - 1).abs().max() <= (0.1 + 2**-8 if "norm" in name else 0.3 / 8**0.5), name
            assert tensor.float().std() > 0.03, name


def test_every_tensor_is_its_own(m2_fp8):
    tensors = read(m2_fp8)
    digests = {(str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes()) for tensor in tensors.values()}
    assert len(digests) == len(tensors)
    assert not any(tensor.float().isnan().any() for tensor in tensors.values())


def test_scales_differ_from_block_to_block():
    weights = RandomWeights(seed=0, experts_per_token=1)
    (tensor,) = (each for each in real_layer() if each.name.endswith("experts.7.w1.weight_scale_inv"))
    scales = torch.frombuffer(bytearray(b"".join(weights.chunks(tensor))), dtype=torch.float32)
    assert scales.numel() == scales.unique().numel() == 12 * 24
    assert 1.35 < scales.max() / scales.min() <= 2**0.5


def test_another_seed_gives_other_weights(m2_fp8, tmp_path):
    make_checkpoint(tmp_path / "other", config_of("minimax_m2"), overrides=SMALL_M2, fmt="fp8", seed=4)
    ours, other = read(m2_fp8), read(tmp_path / "other")
    assert ours.keys() == other.keys()
    assert not any(torch.equal(ours[name].float(), other[name].float()) for name in ours)


def real_layer():
    return plan_tensors(resolve_config(config_of("minimax_m2"), {"layers": 1}, "fp8"))


def test_memory_holds_one_chunk_at_the_real_dimensions():
    weights = RandomWeights(seed=0, experts_per_token=8)
    largest = {tensor.name: tensor for tensor in real_layer() if tensor.size_bytes > 2**24}
    assert "model.embed_tokens.weight" in largest
    assert "model.layers.0.self_attn.q_proj.weight" in largest
    for tensor in largest.values():
        assert all(len(chunk) <= 2**21 for chunk in islice(weights.chunks(tensor), 3))


# --- formats of scripts/checkpoint_formats ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_format_fills_what_it_plans_in_any_process_and_by_the_seed_alone(fmt):
    config = json.loads((DATA / "families" / f"{'gpt_oss' if fmt == 'mxfp4' else 'llama'}.json").read_text())
    config |= {"hidden_size": 64, "num_hidden_layers": 1}
    tensors = plan_tensors(config, fmt=fmt)
    assert any(tensor.fill for tensor in tensors)
    first, again, other = (
        {tensor.name: b"".join(RandomWeights(seed, 2).chunks(tensor)) for tensor in each}
        for seed, each in ((1, tensors), (1, pickle.loads(pickle.dumps(tensors))), (2, tensors))
    )
    assert {tensor.name: tensor.size_bytes for tensor in tensors} == {name: len(data) for name, data in first.items()}
    assert first == again
    drawn = [tensor.name for tensor in tensors if tensor.size_bytes > 64 and not tensor.name.endswith("g_idx")]
    assert all(first[name] != other[name] for name in drawn)
