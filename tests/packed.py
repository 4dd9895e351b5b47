"""Tiny checkpoints of a family in any format of scripts/make_checkpoint.py, and the same weights as bfloat16, for transformers.

A weight is unpacked whole, by the functions that tests/unit/test_quantization_*.py and scripts/layouts hold against each format's own library,
of tensors that this file names: it shares no table, no cut into rows and no placement with what loads a checkpoint.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from m2ray.model.quantization import awq, gptq, mxfp4, nvfp4, pack_quantized
from scripts.checkpoint_formats.stored import StoredTensor
from scripts.checkpoint_formats.table import FORMATS
from scripts.make_checkpoint import RandomWeights, plan_tensors, write_shard
from tests.reference import DATA, chain_rows, load_chain, load_reference, micro_batch_of, reference_rows, same_bits

Parts = Mapping[str, torch.Tensor]
"""Of one weight: what is stored for it, by the end of its name."""

SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {},
    "minimax_m2": {"head_dim": 16, "rotary_dim": 8, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "deepseek_v3": {"q_lora_rank": 32, "kv_lora_rank": 32},
    "glm4_moe": {},
    "gpt_oss": {},
}
"""Sizes of each family, beside those below, that every format can pack."""

_COMMON = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 96, "max_position_embeddings": 256}


def families_with(formats: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a family and a format: each format in two families of six, which change from one format to the next. All pairs where
    M2RAY_EVERY_LAYOUT is set: two minutes of a core."""
    every = "M2RAY_EVERY_LAYOUT" in os.environ
    return [(family, fmt) for one, family in enumerate(SIZES) for other, fmt in enumerate(formats) if every or (one + other) % 3 == 0]


def make_packed(folder: Path, family: str, fmt: str) -> Path:
    """A checkpoint with random codes and scales."""
    config = _config(family)
    says = FORMATS[fmt].quantization_config()
    tensors = plan_tensors(config | ({"quantization_config": says} if says else {}), fmt=fmt)
    folder.mkdir(parents=True)
    write_shard(folder / "model.safetensors", tensors, RandomWeights(7, 2))
    for name, fields in {"config.json": config | ({"quantization_config": says} if says else {}), **FORMATS[fmt].other_files()}.items():
        (folder / name).write_text(json.dumps(fields))
    return folder


def unpack_all(packed: Path, out: Path, family: str, fmt: str) -> Path:
    """The checkpoint in bfloat16 that `packed`, of `make_packed`, stands for."""
    tensors = load_file(packed / "model.safetensors")
    stored = plan_tensors(_config(family) | {"quantization_config": FORMATS[fmt].quantization_config()}, fmt=fmt)
    out.mkdir()
    plain = dict(_unpacked(stored, tensors, fmt))
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(plain, "model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(_config(family)))
    return out


def assert_rows_are_of_the_unpacked_weights(family: str, fmt: str, folder: Path, most_read: float = 1) -> None:
    """Chains of one and of three stages over a packed checkpoint give transformers' rows of the unpacked one, and read nothing else.

    `most_read` of what they need, where pieces share what goes with all of a tensor.
    """
    packed = make_packed(folder / "packed", family, fmt)
    plain = unpack_all(packed, folder / "plain", family, fmt)
    micro_batch = micro_batch_of((9, 5, 1), 96)
    expected = reference_rows(load_reference(plain, torch.bfloat16), micro_batch)
    for bounds in ((0, 3), (0, 1, 2, 3)):
        stages = load_chain(packed, bounds, "bfloat16")
        for layer, (ours, theirs) in enumerate(zip(chain_rows(stages, micro_batch), expected, strict=True)):
            assert same_bits(ours, theirs), layer
        assert all(stage.needed_bytes <= stage.bytes_read <= most_read * stage.needed_bytes for stage in stages)


def _config(family: str) -> dict[str, Any]:
    path = DATA / "minimax_m2" / "config.json" if family == "minimax_m2" else DATA / "families" / f"{family}.json"
    fields = {**json.loads(path.read_text()), **_COMMON, **SIZES[family]}
    fields.pop("quantization_config", None)
    if family == "minimax_m2":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_type_list": [1, 1, 1]}
    return fields


def _unpacked(stored: list[StoredTensor], tensors: Parts, fmt: str) -> Iterator[tuple[str, torch.Tensor]]:
    for (piece,), group in groupby(stored, key=lambda tensor: tensor.pieces):
        members = list(group)
        if members[0].fill is None:
            yield piece.name, tensors[piece.name]
            continue
        base = piece.name.removesuffix("weight")
        parts = {tensor.name.removeprefix(base): tensors[tensor.name] for tensor in members}
        weight = _UNPACK[fmt](parts, piece.shape[-1]).to(torch.bfloat16)
        assert weight.shape == piece.shape, piece.name
        yield piece.name, weight.contiguous()


def _by_grid(parts: Parts, _columns: int) -> torch.Tensor:
    """8-bit values times their scales, of whatever grid: blocks of 128, rows, 32 values of a row, or one scale."""
    values = parts["weight"].float()
    scale = next(parts[end] for end in ("weight_scale_inv", "weight_scale", "scale") if end in parts)
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    rows, columns = values.shape
    tall, wide = (128, 128) if factor.shape == (-(-rows // 128), -(-columns // 128)) else (rows // len(factor), columns // factor.shape[1])
    return values * factor.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def _deepseek_v4(parts: Parts, columns: int) -> torch.Tensor:
    return mxfp4.unpack(parts["weight"], parts["scale"]) if parts["weight"].dtype == torch.int8 else _by_grid(parts, columns)


def _gpt_oss(parts: Parts, _columns: int) -> torch.Tensor:
    blocks, scales = (next(tensor for end, tensor in parts.items() if end.endswith(kind)) for kind in ("_blocks", "_scales"))
    return mxfp4.unpack(blocks.flatten(-2), scales).transpose(1, 2)


def _pack_quantized(parts: Parts, columns: int) -> torch.Tensor:
    return pack_quantized.unpack(parts["weight_packed"], parts["weight_scale"], columns, zero_point=parts.get("weight_zero_point"))


def _modelopt(parts: Parts, _columns: int) -> torch.Tensor:
    return nvfp4.unpack_modelopt(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])


def _compressed_nvfp4(parts: Parts, _columns: int) -> torch.Tensor:
    return nvfp4.unpack_compressed(parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"])


_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_UNPACK: dict[str, Callable[[Parts, int], torch.Tensor]] = {
    **dict.fromkeys(("fp8-static", "fp8-ue8m0", "mxfp8", "modelopt-fp8", "int-quantized"), _by_grid),
    **dict.fromkeys(("float-quantized", "float-quantized-tensor", "float-quantized-block"), _by_grid),
    "deepseek-v4": _deepseek_v4,
    "mxfp4": _gpt_oss,
    "mxfp4-pack-quantized": lambda parts, _: mxfp4.unpack(parts["weight_packed"], parts["weight_scale"]),
    "nvfp4": _modelopt,
    "nvfp4-hf-quant": _modelopt,
    "nvfp4-pack-quantized": _compressed_nvfp4,
    "pack-quantized": _pack_quantized,
    "pack-quantized-asymmetric": _pack_quantized,
    "awq": lambda parts, _: awq.unpack(parts["qweight"], parts["qzeros"], parts["scales"]),
    "gptq-v2": lambda parts, _: gptq.unpack(*(parts[name] for name in _GPTQ), zeros_one_less=False),
    "gptq": lambda parts, _: gptq.unpack(*(parts[name] for name in _GPTQ)),
}
