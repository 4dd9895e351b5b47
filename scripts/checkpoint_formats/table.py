"""The formats that `scripts/make_checkpoint.py --format` writes, beside `fp8` and `bf16`."""

from scripts.checkpoint_formats.bits8 import Compressed, Exponents, ModelOptFp8, StaticFp8
from scripts.checkpoint_formats.deepseek_v4 import DeepSeekV4
from scripts.checkpoint_formats.format import Format
from scripts.checkpoint_formats.fp4 import CompressedMxfp4, CompressedNvfp4, GptOss, ModelOpt
from scripts.checkpoint_formats.int4 import Awq, Gptq, PackQuantized

FORMATS: dict[str, Format] = {
    "fp8-static": StaticFp8(),
    "fp8-ue8m0": Exponents(in_blocks=True),
    "mxfp8": Exponents(),
    "float-quantized": Compressed("float", "channel"),
    "float-quantized-tensor": Compressed("float", "tensor"),
    "float-quantized-block": Compressed("float", "block"),
    "int-quantized": Compressed("int", "channel"),
    "modelopt-fp8": ModelOptFp8(),
    "mxfp4": GptOss(),
    "mxfp4-pack-quantized": CompressedMxfp4(),
    "deepseek-v4": DeepSeekV4(),
    "nvfp4": ModelOpt(),
    "nvfp4-hf-quant": ModelOpt(in_own_file=True),
    "nvfp4-pack-quantized": CompressedNvfp4(),
    "pack-quantized": PackQuantized(),
    "pack-quantized-asymmetric": PackQuantized(symmetric=False),
    "awq": Awq(),
    "gptq": Gptq(),
    "gptq-v2": Gptq(in_order=True),
}
