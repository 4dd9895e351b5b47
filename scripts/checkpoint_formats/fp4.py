"""The formats with FP4 codes."""

from collections.abc import Iterable, Mapping
from math import prod

from scripts.checkpoint_formats.compressed import compressed
from scripts.checkpoint_formats.fills import E2M1_RMS, E4M3_MIDDLE, codes, e4m3_scales, exponents, one
from scripts.checkpoint_formats.format import Config, Format, part
from scripts.checkpoint_formats.stored import Piece, StoredTensor


class GptOss(Format):
    """gpt-oss's own: its experts alone, transposed, in groups of 32."""

    multiple_of = (32, 1)

    def quantization_config(self) -> Config:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}

    def packs(self, piece: Piece) -> bool:
        return len(piece.shape) == 3 and piece.name.endswith(("gate_up_proj", "down_proj"))

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        experts, columns, rows = piece.shape
        groups = (experts, rows, columns // 32)
        yield part(piece, "_blocks", "U8", (*groups, 16), codes(prod(groups) * 16))
        yield part(piece, "_scales", "U8", groups, exponents(prod(groups), E2M1_RMS))


class CompressedMxfp4(Format):
    """compressed-tensors `mxfp4-pack-quantized`."""

    multiple_of = (1, 32)

    def quantization_config(self) -> Config:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return compressed("mxfp4-pack-quantized", weights)

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        yield part(piece, ".weight_packed", "U8", (rows, columns // 2), codes(rows * columns // 2))
        yield part(piece, ".weight_scale", "U8", (rows, columns // 32), exponents(rows * columns // 32, E2M1_RMS))


class ModelOpt(Format):
    """NVIDIA ModelOpt's NVFP4; where it is said in a file of its own, config.json knows nothing of it."""

    multiple_of = (1, 16)

    def __init__(self, *, in_own_file: bool = False) -> None:
        self._in_own_file = in_own_file

    def quantization_config(self) -> Config:
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        group = {"input_activations": weights, "weights": weights, "targets": ["Linear"]}
        said = {"config_groups": {"group_0": group}, "ignore": ["lm_head", "*.gate", "*.router"], "quant_algo": "NVFP4"}
        producer = {"name": "modelopt", "version": "0.47.0"}
        return {} if self._in_own_file else said | {"quant_method": "modelopt", "producer": producer}

    def other_files(self) -> Mapping[str, Config]:
        algorithm = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "*.gate", "*.router"],
        }
        said = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": algorithm}
        return {"hf_quant_config.json": said} if self._in_own_file else {}

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        yield part(piece, "", "U8", (rows, columns // 2), codes(rows * columns // 2))
        yield part(piece, ".weight_scale", "F8_E4M3", (rows, columns // 16), e4m3_scales(rows * columns // 16))
        yield part(piece, ".weight_scale_2", "F32", (), one(1 / E2M1_RMS / E4M3_MIDDLE, 1))
        yield part(piece, ".input_scale", "F32", (), one(0.01))
        for name in "kv":
            if piece.name.endswith(f".{name}_proj.weight"):
                yield part(piece, f".{name}_scale", "F32", (), one(0.02))


class CompressedNvfp4(Format):
    """compressed-tensors `nvfp4-pack-quantized`."""

    multiple_of = (1, 16)

    def quantization_config(self) -> Config:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
        return compressed("nvfp4-pack-quantized", weights | {"scale_dtype": "torch.float8_e4m3fn"})

    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        rows, columns = piece.shape
        yield part(piece, ".weight_packed", "U8", (rows, columns // 2), codes(rows * columns // 2))
        yield part(piece, ".weight_scale", "F8_E4M3", (rows, columns // 16), e4m3_scales(rows * columns // 16))
        yield part(piece, ".weight_global_scale", "F32", (1,), one(E2M1_RMS * E4M3_MIDDLE, -1))
        yield part(piece, ".input_global_scale", "F32", (1,), one(100.0))
