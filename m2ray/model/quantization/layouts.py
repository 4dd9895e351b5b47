"""The table of layouts: what `quantization_config` names, and how its tensors are packed. docs/layouts.md lists them for people."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from m2ray.errors import CheckpointError
from m2ray.model.limits import short_repr
from m2ray.model.quantization import awq, gptq, mxfp4
from m2ray.model.quantization.compressed_tensors import compressed_tensors_layout
from m2ray.model.quantization.layout import Layout
from m2ray.model.quantization.modelopt import modelopt_layout
from m2ray.model.quantization.scaled import EXPONENT_SCALES, FLOAT_SCALES, FP8, ROW, Scaled
from m2ray.model.quantization.scaling import Block
from m2ray.model.quantization.skipped import by_transformers, names_of
from m2ray.model.quantization.stored import Method
from m2ray.model.towers import decoder_config

PLAIN = Layout((), lambda _: None)
"""Nothing is quantised."""

READ = "m2ray reads BF16, F16, F32 and the quantised layouts that docs/layouts.md lists."

_SCALES = ("_scale_inv", "_scale", ".scale", ".qscale_weight")
"""Under which the scales of `fp8` are published: by DeepSeek and most, older static FP8, DeepSeek-V4, Mistral."""

_STATIC_SCALES = (torch.bfloat16, torch.float32, torch.float16)
"""Of a tensor each, the usual first."""

_SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore")


def _fp8(declared: Mapping[str, Any]) -> Layout:
    """FP8 with a scale a block, or, where `weight_block_size` is null, a tensor or a row. Raises CheckpointError."""
    block, scale_fmt = _block(declared), declared.get("scale_fmt")
    blocks: tuple[Block, ...] = (None, ROW) if block is None else (block,)
    if "weight_block_size" not in declared:  # engines write a scale a tensor then, and transformers takes it for its own
        blocks = (None, ROW, (128, 128))
    if scale_fmt not in (None, "float", "ue8m0"):
        raise CheckpointError(f"config.json: scale_fmt {short_repr(scale_fmt)}, a format of scales that m2ray does not know.", READ)
    experts = declared.get("expert_dtype", "fp8")
    if experts not in ("fp8", "fp4"):
        raise CheckpointError(f"config.json: expert_dtype {short_repr(experts)}.", READ)
    dtypes = (*(_STATIC_SCALES if block is None else FLOAT_SCALES), *(EXPONENT_SCALES if scale_fmt == "ue8m0" else EXPONENT_SCALES[:1]))
    if "expert_dtype" in declared:  # DeepSeek-V4 stores exponents; V3.1 has "ue8m0" too, and float32
        dtypes = dtypes[::-1]
    name = "FP8, a scale a tensor" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"
    layout = _transformers_layout(declared, Scaled(name, FP8, blocks, _SCALES, dtypes))
    return layout if experts == "fp8" else _with_experts_in_mxfp4(layout)


def _with_experts_in_mxfp4(layout: Layout) -> Layout:
    """DeepSeek-V4's: its experts in FP4, all else as `layout` has it."""

    def method_of(module: str) -> Method | None:
        return mxfp4.DEEPSEEK_V4 if ".experts." in module else layout.method_of(module)

    return Layout((mxfp4.DEEPSEEK_V4, *layout.methods), method_of, layout.is_left_out)


def _mxfp4(_declared: Mapping[str, Any]) -> Layout:
    """gpt-oss's experts."""
    return Layout(
        (mxfp4.GPT_OSS,), lambda module: mxfp4.GPT_OSS if module.endswith(("experts.gate_up_proj", "experts.down_proj")) else None
    )


def _awq(declared: Mapping[str, Any]) -> Layout:
    return _transformers_layout(declared, awq.of_config(declared))


def _gptq(declared: Mapping[str, Any]) -> Layout:
    return _transformers_layout(declared, gptq.of_config(declared))


def _mxfp8(declared: Mapping[str, Any]) -> Layout:
    """Raises CheckpointError: blocks of another size."""
    block = _block({"weight_block_size": [1, 32], **declared})
    if block != (1, 32):
        raise CheckpointError(f"config.json: mxfp8 with weight_block_size {short_repr(declared['weight_block_size'])}; it has [1, 32].")
    return _transformers_layout(declared, Scaled("MXFP8", FP8[:1], (block,), _SCALES, tuple(reversed(EXPONENT_SCALES))))


def _fbgemm_fp8(declared: Mapping[str, Any]) -> Layout:
    return _transformers_layout(declared, Scaled("FP8, a scale a row (fbgemm)", FP8[:1], (ROW,), ("_scale",)))


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "fp8": _fp8,
    "mxfp8": _mxfp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "compressed-tensors": compressed_tensors_layout,
    "modelopt": modelopt_layout,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
}
"""By quant_method. Each raises CheckpointError for what of it m2ray does not read."""

_OF_EACH = "of each of its layers gives a weight in BF16; or take the BF16 model that it was made from."

WAYS_OUT = {
    "bitsandbytes": "With bitsandbytes installed, `AutoModelForCausalLM.from_pretrained(MODEL).dequantize().save_pretrained(FOLDER)` in transformers "
    "writes it in BF16.",
    "hqq": f"Load it by transformers with hqq installed: `HQQLinear.dequantize()` {_OF_EACH}",
    "torchao": f"Load it by transformers with torchao installed: `weight.dequantize()` {_OF_EACH}",
    "quark": "Take the BF16 model that it was made from: nothing in AMD's quark is known to write BF16 of it.",
    "gguf": "`AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(FOLDER)` in transformers writes it in BF16.",
}
"""What is not read, and which command of which library writes BF16."""


def layout_of(config: Any) -> Layout:
    """The layout of a checkpoint, of transformers' configuration of the whole model.

    Raises:
        CheckpointError: m2ray does not read it.
    """
    declared = quantization(config)
    if not declared:
        return PLAIN
    method = declared.get("quant_method")
    if not isinstance(method, str) or method not in LAYOUTS:
        raise CheckpointError(
            f"config.json: quant_method {short_repr(method)}, which m2ray does not read.", WAYS_OUT.get(str(method), READ)
        )
    return LAYOUTS[method](declared)


def quantization(config: Any) -> Mapping[str, Any]:
    """The quantization_config of the whole model, or else of its decoder alone, as transformers looks for it; empty without one."""
    return next((found for each in (config, decoder_config(config)) if (found := getattr(each, "quantization_config", None))), {})


def _transformers_layout(declared: Mapping[str, Any], method: Method) -> Layout:
    return Layout((method,), lambda _: method, by_transformers(names_of(declared, *_SKIPPED)))


def _block(declared: Mapping[str, Any]) -> Block:
    block = declared.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise CheckpointError(f"config.json: weight_block_size {short_repr(block)} is not two positive numbers.")
    return block[0], block[1]
