"""scripts/make_checkpoint.py: the layout on disk is MiniMax-M2's, the tokenizer loads, and what cannot be is refused."""

import json
import re
import sys
from collections import Counter
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import scripts.make_checkpoint as script
from benchmarks import checkpoints
from m2ray.errors import M2rayError
from scripts.make_checkpoint import main, make_checkpoint, plan_tensors, resolve_config

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


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture(scope="module")
def m2_fp8(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "m2-fp8"
    make_checkpoint(out, config_of("minimax_m2"), overrides=SMALL_M2, fmt="fp8", seed=3)
    return out


@pytest.fixture(scope="module")
def m2_bf16(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "m2-bf16"
    make_checkpoint(out, config_of("minimax_m2"), overrides=SMALL_M2, fmt="bf16", seed=3)
    return out


# --- layout ----------------------------------------------------------------------------------------------------------


def test_real_config_has_the_published_totals():
    tensors = plan_tensors(resolve_config(config_of("minimax_m2"), {}, "fp8"))
    assert len(tensors) == 96_103
    assert sum(tensor.size_bytes for tensor in tensors) == 230_121_630_720
    weights = [tensor for tensor in tensors if not tensor.name.endswith("_scale_inv")]
    assert sum(prod(tensor.shape) for tensor in weights) == 228_689_764_864


def test_fp8_layout_is_minimax_m2s(m2_fp8):
    fp8, bf16, f32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
    expected = {"model.embed_tokens.weight": (bf16, [1024, 256]), "model.norm.weight": (bf16, [256]), "lm_head.weight": (bf16, [1024, 256])}
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        matrices = {
            f"self_attn.{name}_proj": rows for name, rows in {"q": [256, 256], "k": [128, 256], "v": [128, 256], "o": [256, 256]}.items()
        }
        for expert in range(8):
            shapes = {"w1": [128, 256], "w2": [256, 128], "w3": [128, 256]}
            matrices |= {f"block_sparse_moe.experts.{expert}.{name}": shape for name, shape in shapes.items()}
        for name, shape in matrices.items():
            expected[f"{prefix}{name}.weight"] = (fp8, shape)
            expected[f"{prefix}{name}.weight_scale_inv"] = (f32, [side // 128 for side in shape])
        norms = {"self_attn.q_norm": [256], "self_attn.k_norm": [128], "input_layernorm": [256], "post_attention_layernorm": [256]}
        expected |= {f"{prefix}{name}.weight": (bf16, shape) for name, shape in norms.items()}
        expected[f"{prefix}block_sparse_moe.gate.weight"] = (f32, [8, 256])
        expected[f"{prefix}block_sparse_moe.e_score_correction_bias"] = (f32, [8])
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in read(m2_fp8).items()} == expected


def test_config_changes_only_what_was_asked_for(m2_fp8, m2_bf16):
    real, written = config_of("minimax_m2"), json.loads((m2_fp8 / "config.json").read_text())
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    fields = {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
    }
    fields |= {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3, "attn_type_list": [1, 1, 1], "rotary_dim": 32}
    assert written == {**real, **fields, **tokens}
    del written["quantization_config"]
    assert json.loads((m2_bf16 / "config.json").read_text()) == written


def test_shards_and_index_agree_and_their_size_changes_no_value(m2_fp8, tmp_path):
    make_checkpoint(tmp_path / "cut", config_of("minimax_m2"), overrides=SMALL_M2, fmt="fp8", seed=3, max_shard_bytes=600_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) > 5
    for shard in shards:
        with safe_open(tmp_path / "cut" / shard, "pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}
    cut, whole = read(tmp_path / "cut"), read(m2_fp8)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert cut.keys() == whole.keys() == index["weight_map"].keys()
    assert all(same_bits(cut[name], whole[name]) for name in whole)
    per_shard = Counter()
    for name, shard in index["weight_map"].items():
        per_shard[shard] += whole[name].nbytes
    assert max(per_shard.values()) <= 600_000
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (m2_fp8 / name).read_bytes()


def test_bf16_holds_what_fp8_dequantises_to(m2_fp8, m2_bf16):
    fp8, bf16 = read(m2_fp8), read(m2_bf16)
    assert bf16.keys() == {name for name in fp8 if not name.endswith("_scale_inv")}
    for name, tensor in bf16.items():
        expected = fp8[name]
        if expected.dtype == torch.float8_e4m3fn:
            scale = fp8[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = (expected.float() * scale).to(torch.bfloat16)
        assert same_bits(tensor, expected), name


def test_fused_layout_is_what_transformers_saves(m2_bf16, tmp_path):
    make_checkpoint(tmp_path / "fused", config_of("minimax_m2"), overrides=SMALL_M2, fmt="bf16", layout="fused", seed=3)
    saved = AutoModelForCausalLM.from_pretrained(m2_bf16, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved", save_original_format=False)
    ours, theirs = read(tmp_path / "fused"), read(tmp_path / "saved")
    assert "model.layers.0.mlp.experts.gate_up_proj" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours if not name.endswith("e_score_correction_bias"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours.values())


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_loads_and_renders_chats(m2_fp8):
    tokenizer = AutoTokenizer.from_pretrained(m2_fp8)
    assert 262 < len(tokenizer) <= 1024
    text = "The river rises in the hills.\n河流发源于山里。 é\t0.5"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("the river and the water").input_ids) < 10
    assert tokenizer.model_max_length == 196_608
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|begin|><|system|>Be brief.<|end|><|user|>你好<|end|><|assistant|>Hi<|end|>"
    ids = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|end|>", "<|assistant|>"]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    with pytest.raises(Exception, match="Unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_fp8_refuses_uneven_blocks_and_bf16_takes_them(tmp_path):
    overrides = {**SMALL_M2, "layers": 1, "intermediate_size": 96, "head_dim": 40}
    with pytest.raises(M2rayError) as caught:
        make_checkpoint(tmp_path / "out", config_of("minimax_m2"), overrides=overrides, fmt="fp8")
    message = str(caught.value)
    assert "model.layers.self_attn.q_proj.weight would be 160 x 256" in message
    assert "model.layers.block_sparse_moe.experts.w2.weight would be 256 x 96" in message
    assert message.count("experts.w2") == 1
    assert list(tmp_path.iterdir()) == []
    make_checkpoint(tmp_path / "out", config_of("minimax_m2"), overrides=overrides, fmt="bf16")
    assert read(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"].shape == (160, 256)


@pytest.mark.parametrize(
    ("family", "overrides", "complaints"),
    [
        ("llama", {"num_experts": 4, "rotary_dim": 8}, ["num_local_experts = 4", "rotary_dim = 8"]),
        ("qwen3", {"hidden_size": 0}, ["hidden_size = 0"]),
        ("minimax_m2", {"layers": 63, "num_kv_heads": 7}, ["63 layers", "48 attention heads cannot share 7"]),
        ("minimax_m2", {"num_experts": 4, "vocab_size": 100}, ["8 of 4 experts", "vocab_size 100"]),
        ("minimax_m2", {"rotary_dim": 256}, ["head_dim 128, rotary_dim 256"]),
        ("minimax_m2", {"head_dim": 33}, ["head_dim 33"]),
    ],
)
def test_all_contradictions_are_named(family, overrides, complaints):
    with pytest.raises(M2rayError) as caught:
        resolve_config(config_of(family), overrides, "bf16")
    assert all(complaint in str(caught.value) for complaint in complaints)


def test_unknown_family_and_other_blocks_are_refused():
    with pytest.raises(M2rayError, match="model_type is 'none'"):
        resolve_config({"model_type": "none"}, {}, "bf16")
    config = config_of("minimax_m2")
    config["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(M2rayError, match=r"\[64, 64\]"):
        resolve_config(config, {}, "fp8")
    with pytest.raises(M2rayError, match="--format bf16"):
        plan_tensors(resolve_config(config_of("minimax_m2"), {"layers": 1}, "fp8"), "fused")


def test_a_taken_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(M2rayError, match="exists already"):
        make_checkpoint(tmp_path, config_of("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_run_leaves_nothing_under_out(tmp_path, monkeypatch):
    written = []

    def interrupted(path, shard, weights):
        write_shard(path, shard, weights)
        written.append(path)
        assert not (tmp_path / "out").exists()
        if len(written) == 2:
            raise KeyboardInterrupt

    write_shard = script.write_shard
    monkeypatch.setattr(script, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "out", config_of("llama"), overrides={**SMALL, "layers": 2}, fmt="bf16", max_shard_bytes=10**6)
    assert written[0].name.startswith("model-00001-of-")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_made_again_and_files_may_lie_elsewhere(tmp_path, monkeypatch):
    """A checkpoint that is made in several tries, of which one was cut off in the middle of a file."""
    monkeypatch.setattr(checkpoints, "_SHARD_BYTES", 10**6)
    monkeypatch.setattr(checkpoints.os, "cpu_count", lambda: 1)
    folder, elsewhere = tmp_path / "disk", tmp_path / "memory"
    model, num_bytes = checkpoints.spread(folder, elsewhere, 2, 1, {**SMALL_M2, "layers": 2})
    expected = read(model)
    files = sorted(model.glob("*.safetensors"))
    assert num_bytes == sum(path.stat().st_size for path in files)
    assert {path.is_symlink() for path in files} == {False, True}
    assert not files[0].is_symlink()
    gone = files[-1].resolve()
    gone.rename(gone.with_suffix(".partial"))
    assert checkpoints.spread(folder, elsewhere, 2, 1, {**SMALL_M2, "layers": 2})[1] == gone.stat().st_size
    assert read(model).keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in read(model).items())
    assert not list(elsewhere.rglob("*.partial"))


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--config", str(DATA / "qwen3" / "config.json"), "--format", "bf16", "--seed", "1", "--max-shard-size", "1MB"]
    arguments += [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "layers": 1}.items()]
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", str(tmp_path / "out"), *arguments])
    main()
    assert re.search(r"model-00001-of-0000\d.safetensors: \d+ tensors", capsys.readouterr().out)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("make_checkpoint: ")
