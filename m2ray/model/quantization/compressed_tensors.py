"""Layouts of `quant_method: compressed-tensors`: groups of modules, each with a format and what its weights are.

https://github.com/vllm-project/compressed-tensors, 0.20: quantization/quant_config.py, quant_args.py, config/base.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from m2ray.errors import CheckpointError, raise_all
from m2ray.model.limits import short_repr
from m2ray.model.quantization import mxfp4, nvfp4
from m2ray.model.quantization.layout import Layout
from m2ray.model.quantization.pack_quantized import PackQuantized
from m2ray.model.quantization.scaled import EXPONENT_SCALES, ROW, Scaled
from m2ray.model.quantization.scaling import Block
from m2ray.model.quantization.skipped import LINEAR, by_compressed_tensors, names_of
from m2ray.model.quantization.stored import Method

_SCALES = (torch.bfloat16, torch.float32, torch.float16)
"""Of scales, the usual first: that of the model which was quantised."""

Weights = Mapping[str, Any]
"""A group's `weights`: num_bits, type, strategy, group_size, block_structure, symmetric ..."""


def _float_quantized(weights: Weights) -> Method:
    """Raises CheckpointError: of another kind than FP8 e4m3 with a scale a tensor, a row or a block."""
    _require(weights, "float-quantized", type="float", num_bits=8)
    block, name = _shared_by(weights)
    return Scaled(f"FP8, a scale {name} (compressed-tensors)", (torch.float8_e4m3fn,), (block,), ("_scale",), _SCALES, in_scale_dtype=True)


def _int_quantized(weights: Weights) -> Method:
    """Raises CheckpointError: of another kind than symmetric int8 with a scale a tensor, a row or a block."""
    _require(weights, "int-quantized", type="int", num_bits=8)
    block, name = _shared_by(weights)
    return Scaled(f"int8, a scale {name} (compressed-tensors)", (torch.int8,), (block,), ("_scale",), _SCALES, in_scale_dtype=True)


def _naive_quantized(weights: Weights) -> Method:
    return _int_quantized(weights) if weights.get("type", "int") == "int" else _float_quantized(weights)


def _mxfp8_quantized(weights: Weights) -> Method:
    _require(weights, "mxfp8-quantized", type="float", num_bits=8, group_size=32)
    return Scaled("MXFP8 (compressed-tensors)", (torch.float8_e4m3fn,), ((1, 32),), ("_scale",), tuple(reversed(EXPONENT_SCALES)))


def _pack_quantized(weights: Weights) -> Method:
    """Raises CheckpointError: of another kind than whole numbers of 4 or 8 bits with a scale a group, a row or a tensor."""
    is_symmetric = weights.get("symmetric", True)
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8) or not isinstance(is_symmetric, bool):
        what = f"config.json: compressed-tensors' pack-quantized with weights {short_repr(weights)}."
        raise CheckpointError(what, "m2ray reads it with type = int and num_bits = 4 or 8.")
    block, name = _shared_by(weights)
    if block is not None and block[0] != 1:
        raise CheckpointError(f"config.json: compressed-tensors' pack-quantized with a scale {name}; m2ray reads it with groups in a row.")
    if block is None and not is_symmetric:
        raise CheckpointError(
            "config.json: compressed-tensors' pack-quantized with zero points and a scale a tensor, which it does not pack."
        )
    group = (block[1] or None) if block else None
    return PackQuantized(group, weights["num_bits"], is_symmetric=is_symmetric, is_by_tensor=block is None)


def _nvfp4_pack_quantized(weights: Weights) -> Method:
    _require(weights, "nvfp4-pack-quantized", type="float", num_bits=4, group_size=nvfp4.GROUP)
    return nvfp4.COMPRESSED


def _mxfp4_pack_quantized(weights: Weights) -> Method:
    _require(weights, "mxfp4-pack-quantized", type="float", num_bits=4, group_size=mxfp4.GROUP)
    return mxfp4.COMPRESSED


FORMATS: dict[str, Callable[[Weights], Method]] = {
    "float-quantized": _float_quantized,
    "int-quantized": _int_quantized,
    "naive-quantized": _naive_quantized,
    "mxfp8-quantized": _mxfp8_quantized,
    "pack-quantized": _pack_quantized,
    "nvfp4-pack-quantized": _nvfp4_pack_quantized,
    "mxfp4-pack-quantized": _mxfp4_pack_quantized,
}
"""The method of a group's weights, by the group's format; each raises CheckpointError for weights that it is not."""


def compressed_tensors_layout(declared: Mapping[str, Any]) -> Layout:
    """Raises CheckpointError: a group of a format that m2ray does not read, or what changes the model itself; all at once."""
    problems = [
        CheckpointError(f"config.json: quantization_config.{field} = {short_repr(declared[field])}: {why}.")
        for field, why in (
            ("transform_config", "the model computes with rotated weights and activations, which m2ray does not"),
            ("sparsity_config", "sparse weights, which m2ray does not read"),
        )
        if declared.get(field) and not _is_dense(declared[field])
    ]
    groups: list[tuple[list[str], Method | None]] = []
    for each in _groups(declared, problems):
        try:
            groups.append(_group(each, declared.get("format")))
        except CheckpointError as problem:
            problems.append(problem)
    raise_all(problems)
    # A target's own name goes before its class.
    named = [(by_compressed_tensors([name for name in names if name != LINEAR]), method) for names, method in groups]
    of_class = next((method for names, method in groups if LINEAR in names), None)

    def method_of(module: str) -> Method | None:
        return next((method for is_target, method in named if is_target(module)), of_class)

    methods = dict.fromkeys(method for _, method in groups if method is not None)
    return Layout(tuple(methods), method_of, by_compressed_tensors(names_of(declared, "ignore")))


def _groups(declared: Mapping[str, Any], problems: list[CheckpointError]) -> Iterator[Mapping[str, Any]]:
    groups = declared.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    if not found or not all(isinstance(group, Mapping) for group in found):
        what = f"config.json: quantization_config.config_groups = {short_repr(groups)} does not say how each group of weights is packed."
        problems.append(CheckpointError(what, "Save the model again by a current llmcompressor."))
        return
    yield from found


def _group(group: Mapping[str, Any], default_format: Any) -> tuple[list[str], Method | None]:
    """(a group's targets, its method). Raises CheckpointError."""
    targets, weights = names_of(group, "targets"), group.get("weights")
    if weights is None:
        return targets, None
    name = group.get("format") or default_format
    if not isinstance(weights, Mapping) or name not in FORMATS:
        what = f"config.json: compressed-tensors' format {short_repr(name)} with weights {short_repr(weights)}."
        raise CheckpointError(what, f"m2ray reads {', '.join(FORMATS)}; `llmcompressor` writes the model in one of them, or in BF16.")
    return targets, FORMATS[name](weights)


def _is_dense(sparsity: Any) -> bool:
    return isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"


def _require(weights: Weights, name: str, **expected: Any) -> None:
    """Raise CheckpointError unless a group's weights are of this kind and symmetric."""
    wanted = {**expected, "symmetric": True}
    found = {field: weights.get(field, {"symmetric": True, "type": "int"}.get(field)) for field in wanted}
    if differing := [f"{field} = {short_repr(found[field])}" for field in wanted if found[field] != wanted[field]]:
        meant = ", ".join(f"{field} = {value}" for field, value in wanted.items())
        raise CheckpointError(f"config.json: compressed-tensors' {name} with {', '.join(differing)}; m2ray reads it with {meant}.")


def _shared_by(weights: Weights) -> tuple[Block, str]:
    """What shares a scale, and its name. Raises CheckpointError."""
    structure, group = weights.get("block_structure"), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy == "tensor":
        return None, "a tensor"
    if strategy == "channel":
        return ROW, "a row"
    if (
        strategy == "block"
        and isinstance(structure, list)
        and len(structure) == 2
        and all(type(side) is int and side > 0 for side in structure)
    ):
        return (structure[0], structure[1]), f"a block of {structure[0]} x {structure[1]}"
    if strategy == "group" and type(group) is int and group > 0:
        return (1, group), f"{group} values"
    what = f"config.json: compressed-tensors' strategy {short_repr(strategy)} with block_structure {short_repr(structure)}, group_size {short_repr(group)}."
    raise CheckpointError(what, "m2ray reads scales of a tensor, a channel, a block and a group.")
