"""Checkpoints with random codes and scales in each layout, and the same as bfloat16: unpacked one number at a time as the layout is documented.

It shares nothing with m2ray and nothing with `scripts/make_checkpoint.py`: words and bytes are taken apart by numpy's shifts, floats by their bits.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Packed = tuple[Parts, torch.Tensor]
"""What stands in the place of `X.weight`, by the end of its name; and the weight, bfloat16 [rows, columns]."""

Pack = Callable[..., Packed]
"""Of a generator and a weight's sides."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """float8_e4m3fn by its bits: sign, 4 of exponent (less 7), 3 of fraction."""
    sign, exponent, fraction = codes >> 7, (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * np.exp2(exponent - 7.0))
    return np.where(sign == 1, -size, size).astype(np.float32)


def random_e4m3(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Codes of any value but NaN."""
    codes = rng.integers(0, 127, shape).astype(np.uint8)
    return codes | (rng.integers(0, 2, shape) << 7).astype(np.uint8)


def _fp8_blocks(side: int) -> Pack:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = random_e4m3(rng, rows, columns)
        scale = rng.uniform(1e-4, 1e-3, (-(-rows // side), -(-columns // side))).astype(np.float32)
        weight = e4m3(codes) * scale[np.arange(rows)[:, None] // side, np.arange(columns) // side]
        return {".weight": _as(codes, torch.float8_e4m3fn), ".weight_scale_inv": torch.from_numpy(scale)}, _bf16(weight)

    return pack


def _eight_bits(dtype: torch.dtype, *, by_row: bool, scale_dtype: torch.dtype = torch.float32) -> Pack:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = random_e4m3(rng, rows, columns)
        values = e4m3(codes) if dtype == torch.float8_e4m3fn else codes.view(np.int8).astype(np.float32)
        scale = torch.from_numpy(rng.uniform(1e-4, 1e-3, (rows, 1) if by_row else (1,)).astype(np.float32)).to(scale_dtype)
        weight = torch.from_numpy(values * scale.float().numpy()).to(scale_dtype).to(torch.bfloat16)
        return {".weight": _as(codes, dtype), ".weight_scale": scale}, weight

    return pack


def _words(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, columns] in int32 words along a row, lowest bits first, the last word filled with zeros."""
    a_word = 32 // bits
    numbers = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % a_word))).reshape(len(numbers), -1, a_word).astype(np.uint32)
    words = np.bitwise_or.reduce(numbers << (np.arange(a_word, dtype=np.uint32) * bits), axis=-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def _pack_quantized(bits: int, group: int | None, *, symmetric: bool = True, scale_dtype: torch.dtype = torch.bfloat16) -> Pack:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        numbers, width = rng.integers(0, 1 << bits, (rows, columns)), group or columns
        scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, (rows, columns // width)).astype(np.float32)).to(scale_dtype)
        zeros = np.full(tuple(scale.shape), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, tuple(scale.shape))
        less = (numbers - np.repeat(zeros, width, 1)).astype(np.float32)
        weight = torch.from_numpy(less * np.repeat(scale.float().numpy(), width, 1)).to(scale_dtype).to(torch.bfloat16)
        parts = {".weight_packed": _words(numbers, bits), ".weight_scale": scale, ".weight_shape": torch.tensor([rows, columns])}
        if not symmetric:
            parts[".weight_zero_point"] = _words(zeros.T, bits).T.contiguous()
        return parts, weight

    return pack


def _fp4_bytes(rng: np.random.Generator, rows: int, columns: int) -> tuple[torch.Tensor, np.ndarray]:
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    return torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4), codes


def _nvfp4(*, modelopt: bool) -> Pack:
    """ModelOpt stores a factor, compressed-tensors a divisor; the first has no -0.0."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        packed, codes = _fp4_bytes(rng, rows, columns)
        scale, of_all = random_e4m3(rng, rows, columns // 16) & 127, np.float32(rng.uniform(1e-5, 1e-4))
        if modelopt:
            values, factor = E2M1[codes] + np.float32(0), e4m3(scale) * of_all
            names, other = (".weight", ".weight_scale", ".weight_scale_2"), torch.tensor(of_all)
        else:
            of_all = np.float32(1) / of_all
            values, factor = E2M1[codes], e4m3(scale) / of_all
            names, other = (".weight_packed", ".weight_scale", ".weight_global_scale"), torch.tensor([of_all])
        parts = dict(zip(names, (packed, _as(scale, torch.float8_e4m3fn), other), strict=True))
        return parts, _bf16(values * np.repeat(factor, 16, 1))

    return pack


def _mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Packed:
    packed, codes = _fp4_bytes(rng, rows, columns)
    scale = rng.integers(112, 124, (rows, columns // 32)).astype(np.uint8)
    weight = E2M1[codes] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, 1)
    return {".weight_packed": packed, ".weight_scale": torch.from_numpy(scale)}, _bf16(weight)


def _gpt_oss(rng: np.random.Generator, experts: int, columns: int, rows: int) -> Packed:
    """Of experts [experts, columns, rows], stored the other way round, a group's bytes an axis of their own."""
    packed, codes = _fp4_bytes(rng, experts * rows, columns)
    scale = rng.integers(112, 124, (experts, rows, columns // 32)).astype(np.uint8)
    weight = E2M1[codes].reshape(experts, rows, columns) * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, 2)
    return {"_blocks": packed.reshape(experts, rows, -1, 16), "_scales": torch.from_numpy(scale)}, _bf16(weight.transpose(0, 2, 1))


def _awq(group: int | None) -> Pack:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        width = group or columns
        numbers, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // width, rows))
        scale = rng.uniform(1e-3, 1e-2, zeros.shape).astype(np.float16)
        weight = ((numbers - np.repeat(zeros, width, 0)).astype(np.float16) * np.repeat(scale, width, 0)).T
        words = [_words(each.reshape(len(each), -1, 8)[..., order].reshape(each.shape), 4) for each in (numbers, zeros)]
        return {".qweight": words[0], ".qzeros": words[1], ".scales": torch.from_numpy(scale)}, _bf16(weight)

    return pack


def _gptq(group: int | None, *, one_less: bool, in_order: bool) -> Pack:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        width = group or columns
        of_column = np.arange(columns, dtype=np.int32) // width
        of_column = of_column if in_order else rng.permutation(of_column)
        zeros = rng.integers(1, 16, (-(-columns // width), rows))
        numbers, scale = rng.integers(0, 16, (columns, rows)), rng.uniform(1e-3, 1e-2, zeros.shape).astype(np.float16)
        weight = ((numbers - zeros[of_column]).astype(np.float16) * scale[of_column]).T
        parts = {".qweight": _words(numbers.T, 4).T.contiguous(), ".qzeros": _words(zeros - one_less, 4)}
        return parts | {".scales": torch.from_numpy(scale), ".g_idx": torch.from_numpy(of_column)}, _bf16(weight)

    return pack


def _as(codes: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(codes).view(dtype)


def _bf16(weight: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)


def _compressed(*groups: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {f"group_{number}": group for number, group in enumerate(groups)}
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"],
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": by_name,
    }


def _group(fmt: str, kind: str, bits: int, strategy: str, targets: str = "Linear", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"targets": [targets], "format": fmt, "weights": weights}


_FP8, _I8 = torch.float8_e4m3fn, torch.int8
_GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False}
_INT4, _INT8 = _group("pack-quantized", "int", 4, "group", group_size=32), _group("pack-quantized", "int", 8, "channel")
_ATTENTION = {"targets": ["re:.*self_attn.*"]}

LAYOUTS: dict[str, tuple[dict[str, Any], Pack, Pack]] = {
    name: (says, packs[0], packs[-1])
    for name, says, *packs in (
        ("fp8", {"quant_method": "fp8", "weight_block_size": [24, 24]}, _fp8_blocks(24)),
        ("fp8-unsaid", {"quant_method": "fp8", "activation_scheme": "static"}, _eight_bits(_FP8, by_row=False)),
        ("float-channel", _compressed(_group("float-quantized", "float", 8, "channel")), _eight_bits(_FP8, by_row=True)),
        (
            "float-f16",
            _compressed(_group("float-quantized", "float", 8, "tensor")),
            _eight_bits(_FP8, by_row=False, scale_dtype=torch.float16),
        ),
        ("int8", _compressed(_group("int-quantized", "int", 8, "channel")), _eight_bits(_I8, by_row=True, scale_dtype=torch.bfloat16)),
        ("int4", _compressed(_INT4), _pack_quantized(4, 32)),
        ("int4-row", _compressed(_group("pack-quantized", "int", 4, "channel", group_size=-1)), _pack_quantized(4, None)),
        (
            "int4-odd",
            _compressed(_group("pack-quantized", "int", 4, "group", group_size=12)),
            _pack_quantized(4, 12, scale_dtype=torch.float16),
        ),
        (
            "int4-zeros",
            _compressed(_group("pack-quantized", "int", 4, "group", group_size=24, symmetric=False)),
            _pack_quantized(4, 24, symmetric=False),
        ),
        (
            "int8-zeros",
            _compressed(_group("pack-quantized", "int", 8, "group", group_size=24, symmetric=False)),
            _pack_quantized(8, 24, symmetric=False),
        ),
        ("int4-int8", _compressed(_INT4 | _ATTENTION, _INT8), _pack_quantized(4, 32), _pack_quantized(8, None)),
        ("int8-first", _compressed(_INT8, _INT4 | _ATTENTION), _pack_quantized(4, 32), _pack_quantized(8, None)),
        ("nvfp4-ct", _compressed(_group("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16)), _nvfp4(modelopt=False)),
        ("mxfp4-ct", _compressed(_group("mxfp4-pack-quantized", "float", 4, "group", group_size=32)), _mxfp4),
        ("mxfp4", {"quant_method": "mxfp4"}, _gpt_oss),
        ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, _nvfp4(modelopt=True)),
        ("modelopt-fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, _eight_bits(_FP8, by_row=False)),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, _awq(32)),
        ("awq-row", {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"}, _awq(None)),
        ("gptq", {**_GPTQ, "group_size": 32, "desc_act": True}, _gptq(32, one_less=True, in_order=False)),
        ("gptq-odd", {**_GPTQ, "group_size": 40, "desc_act": True}, _gptq(40, one_less=True, in_order=False)),
        (
            "gptq-v2",
            {**_GPTQ, "group_size": 40, "desc_act": False, "checkpoint_format": "gptq_v2"},
            _gptq(40, one_less=False, in_order=True),
        ),
        ("gptq-row", {**_GPTQ, "group_size": -1, "desc_act": False}, _gptq(None, one_less=True, in_order=True)),
    )
}
"""What config.json says, how attention is packed, and all else."""


def pack_checkpoint(plain: Path, out: Path, layout: str, seed: int) -> tuple[Path, Path]:
    """Copies of a checkpoint whose layers' linear weights are random: packed, and as bfloat16 what that stands for."""
    says, of_attention, of_others = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    tensors: Parts = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
    packed, unpacked = dict(tensors), dict(tensors)
    for key, tensor in tensors.items():
        if "layers." in key and key.endswith("_proj" if layout == "mxfp4" else "_proj.weight"):
            pack = of_attention if "self_attn" in key else of_others
            parts, unpacked[key] = pack(rng, *tensor.shape)
            del packed[key]
            packed |= {key.removesuffix(".weight") + end: part for end, part in parts.items()}
    fields = json.loads((plain / "config.json").read_text())
    _save(out / "packed", packed, fields | {"quantization_config": says}, plain)
    _save(out / "plain", unpacked, fields, plain)
    return out / "packed", out / "plain"


def _save(folder: Path, tensors: Parts, fields: Mapping[str, Any], like: Path) -> None:
    """In two files, a weight's parts in either."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    keys = sorted(tensors)
    files = {"one.safetensors": keys[::2], "other.safetensors": keys[1::2]}
    for file, some in files.items():
        save_file({key: tensors[key].contiguous() for key in some}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, some in files.items() for key in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(fields))
