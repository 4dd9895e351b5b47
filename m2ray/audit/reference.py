"""transformers' own whole model of a checkpoint, loaded by transformers and accelerate: none of m2ray's code computes here."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from accelerate.utils import get_max_memory
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from m2ray.errors import CheckpointError

_ROUTERS: dict[str, tuple[str, ...]] = {"minimax_m2": ("mlp.gate.weight", "mlp.e_score_correction_bias")}
"""Tensors that are float32 on disk and that transformers would round, by which other experts are chosen (docs/numerics.md)."""

OnLayer = Callable[[int, torch.Tensor], None]


class Reference:
    """The model, on the devices that accelerate's "auto" deals it out to: GPUs, then host memory, then a temporary folder.

    Args:
        folder: the checkpoint's.
        compute_dtype: "float32", "bfloat16" or "float16".
        attn_implementation: transformers' name of the attention.
        on_cpu: leave the GPUs alone: then it is host memory, and a temporary folder.

    Attributes:
        config: transformers' configuration.
        in_memory: whether all of it lies in the host's memory, every parameter at a multiple of 64 bytes as torch allocates it: kernels
            choose their way by alignment, and files are mapped at any place.

    Raises:
        CheckpointError: transformers cannot load it, or leaves tensors of its layers without values.
    """

    def __init__(self, folder: str, compute_dtype: str, attn_implementation: str, *, on_cpu: bool) -> None:
        self.config = read_config(folder)
        self._offload = tempfile.TemporaryDirectory(prefix="m2ray-audit-")
        try:
            self._model = _load(folder, self.config, compute_dtype, attn_implementation, self._offload.name, on_cpu=on_cpu)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            self._offload.cleanup()
            raise CheckpointError(f"transformers cannot load {folder}: {' '.join(str(error).split())}.") from error
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self.in_memory = all(tensor.device.type == "cpu" for tensor in tensors)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._model
        self._offload.cleanup()

    def run(self, token_ids_BT: torch.Tensor, layers: Sequence[int], on_layer: OnLayer) -> None:
        """Take right-padded sequences, int64 [B, T], through the model, and call `on_layer` with each of `layers` and its output [B, T, H]."""
        decoder = _decoder_layers(self._model)
        hooks = [decoder[layer].register_forward_hook(_handing_on(layer, on_layer)) for layer in layers]
        embedding = self._model.get_input_embeddings().weight
        try:
            with torch.inference_mode():
                at = embedding.device if embedding.device.type != "meta" else torch.device("cpu")
                self._model.base_model(input_ids=token_ids_BT.to(at), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


def read_config(folder: str) -> Any:
    """config.json by transformers itself, without what is a caller's to choose. Raises CheckpointError."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot read the configuration of {folder}: {' '.join(str(error).split())}.",
            "Give the model's folder by --model.",
        ) from error
    config._experts_implementation = None  # noqa: SLF001 - whoever saved it may have chosen one
    rotary_dim = getattr(config, "rotary_dim", None)
    if config.model_type == "minimax_m2" and rotary_dim is not None:  # transformers before 5.23 overlooks it
        config.rope_parameters["partial_rotary_factor"] = rotary_dim / config.head_dim
    if getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    return config


def _load(folder: str, config: Any, compute_dtype: str, attn_implementation: str, offload_folder: str, *, on_cpu: bool) -> Any:
    dtype = getattr(torch, compute_dtype)
    with _routers_in_float32(config):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            # FP8 becomes bfloat16 first, whatever the compute dtype is, as m2ray does
            dtype=torch.bfloat16 if getattr(config, "quantization_config", None) else dtype,
            attn_implementation=attn_implementation,
            device_map="auto",
            max_memory={"cpu": get_max_memory()["cpu"]} if on_cpu else None,
            offload_folder=offload_folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    of_layers = f"{model.base_model_prefix}."
    lacking = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind] if str(name).startswith(of_layers)})
    if lacking:
        raise ValueError(f"it gives no values to {', '.join(lacking[:5])}")
    for name, tensor in model.named_parameters():
        if tensor.dtype == torch.bfloat16 and tensor.dtype != dtype:
            if tensor.is_meta:
                raise ValueError(
                    f"{name} is kept on a disk in bfloat16, and is to be computed with in {compute_dtype}: it needs more memory"
                )
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _routers_in_float32(config: Any) -> Iterator[None]:
    """While a model is loaded, have transformers keep the routers of some families as they are on disk, by its own rule for it."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    rule = "_keep_in_fp32_modules_strict"
    before = getattr(model_class, rule, None)
    setattr(model_class, rule, [*(before or ()), *_ROUTERS.get(config.model_type, ())])
    try:
        yield
    finally:
        setattr(model_class, rule, before)


def _decoder_layers(model: Any) -> nn.ModuleList:
    found = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise CheckpointError(f"{type(model).__name__} has {len(found)} lists of {model.config.num_hidden_layers} decoder layers.")
    return found[0]


def _handing_on(layer: int, on_layer: OnLayer) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        on_layer(layer, output[0] if isinstance(output, tuple) else output)

    return hook
