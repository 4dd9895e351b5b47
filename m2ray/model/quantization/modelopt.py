"""Layouts of `quant_method: modelopt`, and of `hf_quant_config.json`, where ModelOpt's older exports say the same.

https://github.com/NVIDIA/TensorRT-Model-Optimizer, nvidia-modelopt 0.47: torch/export/convert_hf_config.py, quant_utils.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from m2ray.errors import CheckpointError
from m2ray.model.limits import short_repr
from m2ray.model.quantization import nvfp4
from m2ray.model.quantization.layout import Layout, MethodOf
from m2ray.model.quantization.scaled import ROW, Scaled
from m2ray.model.quantization.skipped import by_wildcards, names_of
from m2ray.model.quantization.stored import Method

HF_QUANT_CONFIG = "hf_quant_config.json"

_FP8 = Scaled("FP8, a scale a tensor (ModelOpt)", (torch.float8_e4m3fn,), (None,), ("_scale",))
_FP8_ROWS = Scaled("FP8, a scale a row (ModelOpt)", (torch.float8_e4m3fn,), (ROW,), ("_scale",))
_MXFP8 = Scaled("MXFP8 (ModelOpt)", (torch.float8_e4m3fn,), ((1, 32),), ("_scale",), (torch.uint8, torch.float8_e8m0fnu))


def _nvfp4(said: Mapping[str, Any]) -> Method:
    """Raises CheckpointError: groups of another size."""
    group = said.get("group_size", nvfp4.GROUP)
    if group != nvfp4.GROUP:
        raise CheckpointError(f"config.json: ModelOpt's NVFP4 with group_size {short_repr(group)}; it has {nvfp4.GROUP}.")
    return nvfp4.MODELOPT


ALGORITHMS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "FP8": lambda _: _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": lambda _: _FP8_ROWS,
    "MXFP8": lambda _: _MXFP8,
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
}
"""The method of an algorithm of ModelOpt, made of what the configuration says beside it (`group_size`)."""


def of_hf_quant_config(fields: Any) -> dict[str, Any]:
    """The contents of `hf_quant_config.json` as the `quantization_config` that ModelOpt's newer exports have. Raises CheckpointError."""
    said = fields.get("quantization") if isinstance(fields, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(said.get("quant_algo"), str):
        raise CheckpointError(f"{HF_QUANT_CONFIG} names no quant_algo: {short_repr(fields)}.", "Copy the file again.")
    return {"quant_method": "modelopt", **said, "ignore": said.get("exclude_modules") or []}


def modelopt_layout(declared: Mapping[str, Any]) -> Layout:
    """Raises CheckpointError: an algorithm that m2ray does not read."""
    is_ignored = by_wildcards(names_of(declared, "ignore", "exclude_modules"))
    if declared.get("quant_algo") == "MIXED_PRECISION":
        methods, method_of = _mixed(declared)
    else:
        method = _method(declared)
        methods, method_of = (method,), lambda _: method
    return Layout(methods, method_of, is_ignored)


def _mixed(declared: Mapping[str, Any]) -> tuple[tuple[Method, ...], MethodOf]:
    layers = declared.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(each, Mapping) for each in layers.values()):
        raise CheckpointError(f"config.json: MIXED_PRECISION with quantized_layers = {short_repr(layers)}.", "Copy the file again.")
    by_module = {name: _method(each) for name, each in layers.items()}
    return tuple(dict.fromkeys(by_module.values())), by_module.get


def _method(said: Mapping[str, Any]) -> Method:
    algorithm = said.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        what = f"config.json: ModelOpt's quant_algo {short_repr(algorithm)}."
        raise CheckpointError(what, f"m2ray reads {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[algorithm](said)
