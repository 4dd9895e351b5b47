"""Official quantised releases by the names, dtypes and shapes of their tensors: all are known, and the bytes of each are planned exactly.

Facts, as public repositories have them; no weights. Configurations: tests/data/official. The large ones are cut to the layers of each kind.

| release | repository | commit | path there |
|---|---|---|---|
| gpt-oss-20b, gpt-oss-120b: names | foxl-ai/kiln | a04d1fab9063fdd0a612f9bdcb3b816a3b5cd10f | tests/test_gpt_oss.py |
| MiniMax-M2.7-NVFP4: names, dtypes, quantization_config | 6ixLabs-AI/dgpp | aeb2efe2789404101c9ceb4c074f3d63a7c98ec4 | tools/minimax_m2_synth.py |
| Kimi-K2.6: sizes, names and number of tensors, bytes of the experts | 2096955/TurboQuantNemo | 40501b2012b9e3c9893e3065271b7a1313a4a476 | results/kimi_k26_checkpoint_census.json |
| Kimi-K2.5, K2.6: names, dtypes, shapes | tenstorrent/tt-metal | 90dd34339b0f3906a49e223311b868d09993bb6d | models/demos/kimi_k25/tests/test_weight_loader.py |
| MiniMax-M3-MXFP8: names, dtypes, shapes, quantization_config | lightseekorg/tokenspeed | 720d83ae1d6565fbcc4661991a6e0984456f15f2 | test/runtime/models/test_minimax_m3.py |
| GLM-4.7-FP8: experts' names, dtypes, shapes as measured in the files, quantization_config, sizes | mystous/vllm_hybrid | ba9ba699a2df416731152ea6700b3adb8268611e | shadow_assists/features/IDE_075/G00_code_review.md |
| GLM-4.7: the other sizes, names of its layer for the token after next | alibaba/rtp-llm | 423b66283e6e9d80f6fae17ebc120c300b1827e7 | rtp_llm/test/glm4_moe_nextn_test.py |
| GLM-4.5-Air-FP8, of the same make: every layer's names and dtypes, quantization_config | LoomaFloat/freetoken | 617ceac6bc38c15fb8a4903d9851df03fdab07dd | tests/models/test_glm4_moe_fp8.py |
"""

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch

from m2ray.model.families import parse_config
from m2ray.model.headers import DTYPES, TensorHeader
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensor_table import table_of, table_without_weights
from m2ray.tensor_rows import TensorTable
from tests.reference import DATA

Published = Iterator[tuple[str, str, tuple[int, ...]]]
"""(name, dtype, shape) of a release's tensors."""


def official(release: str, **changed: Any) -> dict[str, Any]:
    """The fields of its config.json, of its text tower where it has one, with some changed."""
    fields = json.loads((DATA / "official" / f"{release}.json").read_text())
    text = fields.get("text_config", fields)
    layers = changed.get("num_hidden_layers", text["num_hidden_layers"])
    text |= {name: value[:layers] for name, value in text.items() if isinstance(value, list) and len(value) == text["num_hidden_layers"]}
    nested = text.get("sparse_attention_config", {})
    nested |= {name: value[:layers] for name, value in nested.items() if isinstance(value, list)}
    said = changed.pop("quantization_config", None)
    text |= changed
    return fields | ({"quantization_config": said} if said else {})


def planned(fields: dict[str, Any], tensors: Published) -> tuple[TensorTable, TensorTable]:
    """The table of a release's tensors, after every one of them was found to belong, and the table of its configuration alone."""
    headers, offset = {}, 0
    for name, dtype, shape in tensors:
        num_bytes = prod(shape) * DTYPES[dtype].itemsize
        headers[name] = TensorHeader("model.safetensors", DTYPES[dtype], shape, offset, num_bytes)
        offset += num_bytes
    config = parse_config(json.dumps(fields).encode())
    found = table_of(build_skeleton(config, torch.bfloat16), headers)
    assert sum(row.disk_bytes for row in found.rows) == offset
    return found, table_without_weights(config)


def assert_alike(found: TensorTable, implied: TensorTable) -> None:
    """Of each packed tensor the same method and bytes, whether its files are there or its configuration alone is."""
    packed = {row.name: (row.method, row.disk_bytes) for row in found.rows if row.method and row.role == "layer"}
    assert packed == {row.name: (row.method, row.disk_bytes) for row in implied.rows if row.method}


def gpt_oss(fields: dict[str, Any]) -> Published:
    hidden, heads, groups, experts = (
        fields[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_local_experts")
    )
    wide, across = fields["intermediate_size"], fields["hidden_size"] // 32
    yield from (("model.embed_tokens.weight", "BF16", (fields["vocab_size"], hidden)), ("model.norm.weight", "BF16", (hidden,)))
    yield "lm_head.weight", "BF16", (fields["vocab_size"], hidden)
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("q", heads * 64, hidden),
            ("k", groups * 64, hidden),
            ("v", groups * 64, hidden),
            ("o", hidden, heads * 64),
        ):
            yield f"{at}self_attn.{name}_proj.weight", "BF16", (rows, columns)
            yield f"{at}self_attn.{name}_proj.bias", "BF16", (rows,)
        yield from ((f"{at}self_attn.sinks", "BF16", (heads,)), (f"{at}mlp.router.bias", "BF16", (experts,)))
        yield f"{at}mlp.router.weight", "BF16", (experts, hidden)
        for name, rows in (("gate_up_proj", 2 * wide), ("down_proj", hidden)):
            yield f"{at}mlp.experts.{name}_blocks", "U8", (experts, rows, across, 16)
            yield f"{at}mlp.experts.{name}_scales", "U8", (experts, rows, across)
            yield f"{at}mlp.experts.{name}_bias", "BF16", (experts, rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", "BF16", (hidden,)


@pytest.mark.parametrize(
    ("release", "num_tensors", "num_bytes"), [("gpt-oss-20b", 459, 13_761_264_768), ("gpt-oss-120b", 687, 65_248_815_744)]
)
def test_gpt_oss_is_planned_to_the_byte_of_its_index(release: str, num_tensors: int, num_bytes: int) -> None:
    fields = official(release)
    assert len(list(gpt_oss(fields))) == num_tensors
    found, implied = planned(fields, gpt_oss(fields))
    assert sum(row.disk_bytes for row in found.rows) == sum(row.disk_bytes for row in implied.rows) == num_bytes
    assert_alike(found, implied)
    assert len({row.name for row in found.rows if row.method}) == 2 * fields["num_hidden_layers"]


def minimax_m2_nvfp4(layers: int) -> Published:
    hidden, experts, wide = 3072, 256, 1536
    yield from (("model.embed_tokens.weight", "BF16", (200_064, hidden)), ("model.norm.weight", "BF16", (hidden,)))
    yield "lm_head.weight", "BF16", (200_064, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows, columns in (("q", 6144, hidden), ("k", 1024, hidden), ("v", 1024, hidden), ("o", hidden, 6144)):
            yield f"{at}self_attn.{name}_proj.weight", "BF16", (rows, columns)
        for name, size in (
            ("self_attn.q_norm", 6144),
            ("self_attn.k_norm", 1024),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            yield f"{at}{name}.weight", "BF16", (size,)
        yield f"{at}block_sparse_moe.gate.weight", "BF16", (experts, hidden)
        yield f"{at}block_sparse_moe.e_score_correction_bias", "BF16", (experts,)
        for expert in range(experts):
            for name, rows, columns in (("w1", wide, hidden), ("w2", hidden, wide), ("w3", wide, hidden)):
                weight = f"{at}block_sparse_moe.experts.{expert}.{name}."
                yield f"{weight}weight", "U8", (rows, columns // 2)
                yield f"{weight}weight_scale", "F8_E4M3", (rows, columns // 16)
                yield f"{weight}weight_scale_2", "F32", ()
                if expert != 3:  # whose calibration saw no token
                    yield f"{weight}input_scale", "F32", ()


def test_minimax_m2_in_nvfp4_with_scales_that_some_experts_lack() -> None:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.39.0"}}
    ignored = ["lm_head", *(f"model.layers.{layer}.{name}" for layer in range(2) for name in ("block_sparse_moe.gate", "self_attn*"))]
    groups = {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}}
    fields = official("MiniMax-M2.7", num_hidden_layers=2, quantization_config=said | {"config_groups": groups, "ignore": ignored})
    found, implied = planned(fields, minimax_m2_nvfp4(2))
    assert_alike(found, implied)
    assert sum(row.role == "unused" for row in found.rows) == 2 * 255 * 3


def kimi(layers: int) -> Published:
    hidden, experts, top = 7168, 384, "language_model.model."
    yield from ((f"{top}embed_tokens.weight", "BF16", (163_840, hidden)), (f"{top}norm.weight", "BF16", (hidden,)))
    yield "language_model.lm_head.weight", "BF16", (163_840, hidden)
    for layer in range(layers):
        at = f"{top}layers.{layer}."
        shapes = {"q_a_proj": (1536, hidden), "q_b_proj": (12_288, 1536), "kv_a_proj_with_mqa": (576, hidden), "kv_b_proj": (16_384, 512)}
        shapes |= {"o_proj": (hidden, 8192), "q_a_layernorm": (1536,), "kv_a_layernorm": (512,)}
        for name, shape in shapes.items():
            yield f"{at}self_attn.{name}.weight", "BF16", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", "BF16", (hidden,)
        dense, wide = ("mlp.", 18_432) if layer == 0 else ("mlp.shared_experts.", 2048)
        for name, shape in {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}.items():
            yield f"{at}{dense}{name}.weight", "BF16", shape
        if layer == 0:
            continue
        yield f"{at}mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{at}mlp.gate.e_score_correction_bias", "F32", (experts,)
        for expert in range(experts):
            for name, (rows, columns) in {"gate_proj": (2048, hidden), "up_proj": (2048, hidden), "down_proj": (hidden, 2048)}.items():
                weight = f"{at}mlp.experts.{expert}.{name}."
                yield f"{weight}weight_packed", "I32", (rows, columns // 8)
                yield f"{weight}weight_scale", "BF16", (rows, columns // 32)
                yield f"{weight}weight_shape", "I32", (2,)


def test_kimi_in_int4() -> None:
    found, implied = planned(official("Kimi-K2.5", num_hidden_layers=2), kimi(2))
    sizes = [{row.name: row.disk_bytes for row in table.rows if row.method and row.role == "layer"} for table in (found, implied)]
    assert sizes[0].keys() == sizes[1].keys()
    # Its weight_shape is int32, where compressed-tensors writes int64.
    assert sum(sizes[1].values()) - sum(sizes[0].values()) == 384 * 3 * 2 * 4
    # Kimi-K2.6's census: 207,360 tensors of routed experts in 60 of 61 layers, 570.8 GB.
    text = official("Kimi-K2.5")["text_config"]
    assert (text["num_hidden_layers"], text["first_k_dense_replace"], text["n_routed_experts"], text["moe_intermediate_size"]) == (
        61,
        1,
        384,
        2048,
    )
    assert 60 * sum(".experts." in name for name, _, _ in kimi(2)) == 207_360
    assert round(60 * sum(sizes[0].values()) / 1e9, 1) == 570.8


def minimax_m3(layers: int) -> Published:
    hidden, experts, top = 6144, 128, "language_model.model."
    yield from ((f"{top}embed_tokens.weight", "BF16", (200_064, hidden)), (f"{top}norm.weight", "BF16", (hidden,)))
    yield "language_model.lm_head.weight", "BF16", (200_064, hidden)
    for layer in range(layers):
        at, is_dense = f"{top}layers.{layer}.", layer < 3
        packed = {"self_attn.q_proj": (8192, hidden), "self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden)}
        packed |= {"self_attn.o_proj": (hidden, 8192)}
        norms = {"self_attn.q_norm": 128, "self_attn.k_norm": 128, "input_layernorm": hidden, "post_attention_layernorm": hidden}
        dense, wide = ("mlp.", 12_288) if is_dense else ("block_sparse_moe.shared_experts.", 3072)
        packed |= {f"{dense}gate_proj": (wide, hidden), f"{dense}up_proj": (wide, hidden), f"{dense}down_proj": (hidden, wide)}
        if not is_dense:
            packed |= {"self_attn.index_q_proj": (512, hidden), "self_attn.index_k_proj": (128, hidden)}
            norms |= {"self_attn.index_q_norm": 128, "self_attn.index_k_norm": 128}
            yield f"{at}block_sparse_moe.gate.weight", "F32", (experts, hidden)
            yield f"{at}block_sparse_moe.e_score_correction_bias", "F32", (experts,)
            for expert in range(experts):
                of = f"block_sparse_moe.experts.{expert}."
                packed |= {f"{of}w1": (3072, hidden), f"{of}w2": (hidden, 3072), f"{of}w3": (3072, hidden)}
        for name, size in norms.items():
            yield f"{at}{name}.weight", "BF16", (size,)
        for name, (rows, columns) in packed.items():
            yield f"{at}{name}.weight", "F8_E4M3", (rows, columns)
            yield f"{at}{name}.weight_scale_inv", "U8", (rows, columns // 32)


def test_minimax_m3_in_mxfp8() -> None:
    said = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
    ignored = ["lm_head", "model.embed_tokens", "model.layers.3.block_sparse_moe.gate", "vision_tower", "multi_modal_projector"]
    fields = official("MiniMax-M3-NVFP4", num_hidden_layers=4, quantization_config=said | {"ignored_layers": ignored})
    assert_alike(*planned(fields, minimax_m3(4)))


def glm_4_7_fp8(layers: int) -> Published:
    hidden, experts = 5120, 160
    yield from (("model.embed_tokens.weight", "BF16", (151_552, hidden)), ("model.norm.weight", "BF16", (hidden,)))
    yield "lm_head.weight", "BF16", (151_552, hidden)
    for layer in range(layers + 1):
        at = f"model.layers.{layer}."
        packed = {"self_attn.q_proj": (12_288, hidden), "self_attn.k_proj": (1024, hidden), "self_attn.v_proj": (1024, hidden)}
        for name, (rows, _) in packed.items():
            yield f"{at}{name}.bias", "BF16", (rows,)
        packed["self_attn.o_proj"] = (hidden, 12_288)
        norms = {"self_attn.q_norm": 128, "self_attn.k_norm": 128, "input_layernorm": hidden, "post_attention_layernorm": hidden}
        dense = (
            {"mlp.": 12_288}
            if layer < 3
            else {f"mlp.{name}.": 1536 for name in ("shared_experts", *(f"experts.{n}" for n in range(experts)))}
        )
        for name, wide in dense.items():
            packed |= {f"{name}gate_proj": (wide, hidden), f"{name}up_proj": (wide, hidden), f"{name}down_proj": (hidden, wide)}
        if layer >= 3:
            yield f"{at}mlp.gate.weight", "BF16", (experts, hidden)
            yield f"{at}mlp.gate.e_score_correction_bias", "F32", (experts,)
        if layer == layers:  # which guesses the token after next
            norms |= {"enorm": hidden, "hnorm": hidden, "shared_head.norm": hidden}
            yield f"{at}eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield from ((f"{at}{name}.weight", "BF16", (151_552, hidden)) for name in ("embed_tokens", "shared_head.head"))
        for name, size in norms.items():
            yield f"{at}{name}.weight", "BF16", (size,)
        for name, (rows, columns) in packed.items():
            yield f"{at}{name}.weight", "F8_E4M3", (rows, columns)
            yield f"{at}{name}.weight_scale", "F32", (rows, 1)


def test_glm_4_7_in_fp8_by_row() -> None:
    fields = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "dtype": "bfloat16", "vocab_size": 151_552}
    fields |= {"hidden_size": 5120, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "num_hidden_layers": 4}
    fields |= {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "use_qk_norm": True}
    fields |= {"n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 1}
    fields |= {"topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 1}
    fields |= {"max_position_embeddings": 202_752, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": weights | {"strategy": "token", "dynamic": True}}
    ignored = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(5))]
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, "ignore": ignored}
    found, implied = planned(fields | {"quantization_config": said}, glm_4_7_fp8(4))
    sizes = [{row.name: row.disk_bytes for row in table.rows if row.method and row.role == "layer"} for table in (found, implied)]
    assert sizes[0].keys() == sizes[1].keys()
    # Its scales are float32, where compressed-tensors usually writes those of a model in bfloat16.
    rows = sum(shape[0] for name, _, shape in glm_4_7_fp8(4) if name.endswith("weight_scale") and ".layers.4." not in name)
    assert sum(sizes[0].values()) - sum(sizes[1].values()) == 2 * rows
    assert {row.method for row in found.rows if row.method} == {"FP8, a scale a row (compressed-tensors)"}
